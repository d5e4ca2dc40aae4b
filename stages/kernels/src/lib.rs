//! Reproducible tensor maths: profile `cpu-1`.
//!
//! Nodes that do not trust each other compare digests of what they computed, so every operation here is a pure function
//! of its operands: the same bits on every instruction set, for every batch size, chunk size and number of threads.
//! Each operation has a short scalar definition, and each vector path must equal it bit for bit; tests compare them.
//!
//! Invariants:
//! - Each output element is one fixed sequence of correctly rounded IEEE-754 operations. Vector code runs the same
//!   sequence for sixteen outputs at once and never splits a sequence.
//! - One thread owns whole output elements; how elements are dealt to threads never reaches a bit.
//! - The payload of a NaN is not part of the profile. Callers check [`all_finite`] where a row leaves a computation and
//!   end the request with [`Numeric`]; only [`math`] functions promise a canonical NaN.
//!
//! The crate knows nothing of models, files, requests or clocks.

// Without a vector path there is no caller of the vector code, which compiles all the same.
#![cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]

pub mod math;
pub mod sample;

mod activation;
mod activation_blocks;
mod attention;
mod blocks;
mod cache;
mod element;
mod environment;
mod lanes;
mod likelihood;
mod linear;
mod matrix;
mod norm;
mod path;
mod pool;
mod profile;
mod rope;
mod simd;
mod tile;

pub use activation::{add_assign, gelu, relu, sigmoid, silu, silu_mul, tanh};
pub use attention::{attention, attention_bidirectional};
pub use cache::{CacheStorage, KvCache};
pub use element::Dtype;
pub use environment::float_environment_ok;
pub use lanes::{all_finite, argmax, sum};
pub use likelihood::{LogProbs, log_probs};
pub use linear::linear;
pub use matrix::{Matrix, PackError, WeightView};
pub use norm::{layer_norm, rms_norm};
pub use path::{Path, Refused, Unsupported};
pub use pool::Pool;
pub use profile::{PROFILE, profile_digest};
pub use rope::{RopeError, RopeScaling, RopeTable, rope};

#[cfg(target_arch = "x86_64")]
pub use simd::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use simd::avx512::Avx512;

#[cfg(target_arch = "aarch64")]
pub use simd::neon::Neon;

/// A computation met a NaN or an infinity. The request that caused it ends with one canonical outcome, which carries no
/// number, so that NaN bits never enter a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("the computation met a NaN or an infinity")]
pub struct Numeric;
