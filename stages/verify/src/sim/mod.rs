//! Whole clusters of tallies under seeded faults.
//!
//! A seed decides everything: the cluster, who lies and how, how boundaries are fed on, and what the network does. Two
//! requests run at once, votes of an earlier epoch are still about, and two gateways hear everything in their own order.
//! Safety must hold for every seed; liveness where at most f replicas of a slice lie and nothing is lost.
//!
//! Honest nodes may have been fed lies: they vote for what follows from their input, as the protocol has it.

mod cluster;
mod liar;
mod model;
mod planted;
mod random;
pub(crate) mod world;

pub(crate) use cluster::{Plan, Violation, run};
pub(crate) use liar::{forged_answer, high_s};
