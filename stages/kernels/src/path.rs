//! Which instructions compute: the scalar definition, or one of the vector paths.
//!
//! A path only chooses instructions. All paths give the same bits, so a path is free to differ between nodes, and never
//! enters a digest. To add one: implement [`Simd`](crate::simd::Simd) for its token, and add its variant, its place among
//! the candidates, its name and its arm of `run`. The kernels do not change.
//!
//! A vector path is used only after it has proved itself on this very machine: once in a process, every operation's
//! golden outputs are computed with it and compared with the definition's.

use std::sync::OnceLock;

use crate::pool::Pool;
use crate::profile::{Output, path_outputs};
#[cfg(target_arch = "x86_64")]
use crate::simd::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use crate::simd::avx512::Avx512;
#[cfg(target_arch = "aarch64")]
use crate::simd::neon::Neon;
use crate::simd::{Kernel, Simd};

/// The instructions a [`Pool`] computes with. A vector variant holds a token that proves the processor has its
/// instructions, so a `Path` in hand is always safe to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Path {
    /// Plain Rust, one element at a time: the definition of the profile. Right everywhere, and slow.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (`x86-64-v3`).
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// x86-64 with AVX-512 F, BW, DQ and VL (`x86-64-v4`).
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<false>),
    /// The same with VNNI, which multiplies bytes and adds them up by fours.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512<true>),
    /// 64-bit Arm with NEON.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

/// The processor has no fused multiply-add that this crate has a vector path for, or every vector path computed other
/// bits than the definition ([`Path::refused`] says where). The scalar definition still gives the right bits, but far
/// too slowly to serve in a verifying cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no fused multiply-add of this processor is known to give the bits of profile cpu-1: that takes AVX2, FMA and F16C \
     (x86-64-v3), or NEON, and that they compute as the definition does"
)]
pub struct Unsupported;

/// A path that this processor has instructions for, and that computed other bits than the definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("path {} is not used: its '{operation}' differs from the definition on this machine", path.name())]
pub struct Refused {
    /// The path.
    pub path: Path,
    /// The first operation that differs.
    pub operation: &'static str,
}

struct Survey {
    /// Slowest first.
    proven: Vec<Path>,
    refused: Vec<Refused>,
}

impl Path {
    /// The fastest path of this processor that has proved itself.
    ///
    /// # Errors
    /// [`Unsupported`] if only the scalar definition would be left.
    pub fn detect() -> Result<Path, Unsupported> {
        survey().proven.last().copied().ok_or(Unsupported)
    }

    /// Every path of this processor that has proved itself, slowest first. The first is always [`Path::Scalar`].
    pub fn available() -> Vec<Path> {
        let mut paths = vec![Path::Scalar];
        paths.extend(&survey().proven);
        paths
    }

    /// Paths that this processor has instructions for and that are not used, with the reason. Empty on a sound machine.
    pub fn refused() -> &'static [Refused] {
        &survey().refused
    }

    /// `scalar`, `avx2`, `avx512`, `avx512-vnni`, `neon`.
    pub fn name(self) -> &'static str {
        match self {
            Path::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Path::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Path::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Vnni(_) => "avx512-vnni",
            #[cfg(target_arch = "aarch64")]
            Path::Neon(_) => "neon",
        }
    }

    /// [`Simd::WIDE`] of this path's instructions.
    pub(crate) fn is_wide(self) -> bool {
        self.run(IsWide)
    }

    /// Runs a kernel with this path's instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Path::Scalar => kernel.scalar(),
            #[cfg(target_arch = "x86_64")]
            Path::Avx2(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Path::Avx512(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Vnni(simd) => simd.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Path::Neon(simd) => simd.run(kernel),
        }
    }
}

struct IsWide;

impl Kernel for IsWide {
    type Output = bool;

    fn scalar(self) -> bool {
        false
    }

    #[inline(always)]
    fn vector<S: Simd>(self, _simd: S) -> bool {
        S::WIDE
    }
}

/// Vector paths that this processor has instructions for, slowest first.
fn candidates() -> Vec<Path> {
    let mut paths = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        paths.extend(Avx2::detect().map(Path::Avx2));
        paths.extend(Avx512::detect().map(Path::Avx512));
        paths.extend(Avx512::detect().map(Path::Avx512Vnni));
    }
    #[cfg(target_arch = "aarch64")]
    paths.extend(Neon::detect().map(Path::Neon));
    paths
}

fn survey() -> &'static Survey {
    static SURVEY: OnceLock<Survey> = OnceLock::new();
    SURVEY.get_or_init(|| {
        let candidates = candidates();
        let mut survey = Survey { proven: Vec::new(), refused: Vec::new() };
        if candidates.is_empty() {
            return survey;
        }
        let expected = path_outputs(&Pool::new(1, Path::Scalar));
        for path in candidates {
            match difference(&expected, &path_outputs(&Pool::new(1, path))) {
                None => survey.proven.push(path),
                Some(operation) => survey.refused.push(Refused { path, operation }),
            }
        }
        survey
    })
}

/// The first operation with other bits than expected.
fn difference(expected: &[Output], found: &[Output]) -> Option<&'static str> {
    let mut pairs = expected.iter().zip(found);
    pairs.find(|(expected, found)| expected.bits != found.bits).map(|(expected, _)| expected.operation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_of_this_processor_proves_itself() {
        assert_eq!(Path::refused(), []);
        assert_eq!(Path::available()[0], Path::Scalar);
        assert_eq!(Path::available()[1..], candidates());
    }

    #[test]
    fn one_other_bit_in_any_operation_is_a_difference() {
        let expected = path_outputs(&Pool::new(1, Path::Scalar));
        let mut found = path_outputs(&Pool::new(1, Path::Scalar));
        assert_eq!(difference(&expected, &found), None);
        for i in 0..found.len() {
            let last = found[i].bits.len() - 1;
            found[i].bits[last] ^= 1;
            assert_eq!(difference(&expected, &found), Some(expected[i].operation));
            found[i].bits[last] ^= 1;
        }
    }
}
