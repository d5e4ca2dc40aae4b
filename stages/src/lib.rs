//! Butterfly.
