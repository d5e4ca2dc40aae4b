//! Butterfly.
fn main() {}
