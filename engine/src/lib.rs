//! How items move: typed stages on bounded channels within a node, authenticated links between nodes.
//!
//! A checked topology is compiled into unspawned stages ([`wiring`]), which are then run and supervised ([`running`]).
//! Stage code sees typed ports ([`channel`]), a context ([`stage`]) and, for networked kinds, a port to its
//! counterparts on other nodes ([`link`]).
//!
//! Invariants: every queue is bounded in items and in bytes; time is read in [`clock`] alone; a transport's own types
//! never leave [`transport`].
//!
//! It refuses to know models, votes, and HTTP, and it never matches on the kind of a stage.

pub mod channel;
pub mod clock;
pub mod frame;
pub mod link;
pub mod registry;
pub mod running;
pub mod shutdown;
pub mod stage;
pub mod telemetry;
pub mod transport;
pub mod wiring;
