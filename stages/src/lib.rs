//! Run one model across machines that do not trust each other, and prove every answer.
//!
//! This crate is what happens to a request: the seven stages, the models they run, and the assembly of a node
//! from a checked topology. How items move is the engine's business (`butterfly-engine`), what is declared is the
//! topology's (`butterfly-topology`), what a vote means is the protocol's (`butterfly-verify`), and which bits a
//! forward pass yields is the kernels' (`butterfly-kernels`).
//!
//! A request passes `ingest → partition → assign → transfer → compute → consensus → commit`; the items on the way are in
//! [`items`], the stages one folder each.

pub mod admin;
pub mod assign;
pub mod commit;
pub mod compute;
pub mod consensus;
pub mod error;
pub mod ingest;
pub mod items;
pub mod loopback;
pub mod model;
pub mod node;
pub mod partition;
pub mod registry;
pub mod services;
pub mod standing;
pub mod transfer;

#[cfg(feature = "adversary")]
pub mod adversary;
