//! Which instructions compute: the scalar definition, or one of the vector paths.
//!
//! A path only chooses instructions. All paths give the same bits, so a path is free to differ between nodes, and never
//! enters a digest. To add one (AVX-512, NEON): implement [`Simd`](crate::simd::Simd) for its token, and add its variant
//! and an arm to the three matches below. The kernels do not change.

use crate::simd::Kernel;
#[cfg(target_arch = "x86_64")]
use crate::simd::avx2::Avx2;

/// The instructions a [`Pool`](crate::Pool) computes with. A vector variant holds a token that proves the processor has
/// its instructions, so a `Path` in hand is always safe to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Path {
    /// Plain Rust, one element at a time: the definition of the profile. Right everywhere, and slow.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (`x86-64-v3`).
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
}

/// The processor has no fused multiply-add that this crate has a vector path for. The scalar definition still gives the
/// right bits, but far too slowly to serve in a verifying cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this processor has no supported fused multiply-add: profile cpu-1 needs AVX2, FMA and F16C (x86-64-v3)")]
pub struct Unsupported;

impl Path {
    /// The fastest path of this processor.
    ///
    /// # Errors
    /// [`Unsupported`] if only the scalar definition would be left.
    pub fn detect() -> Result<Path, Unsupported> {
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = Avx2::detect() {
            return Ok(Path::Avx2(avx2));
        }
        Err(Unsupported)
    }

    /// Every path of this processor, slowest first. The first is always [`Path::Scalar`].
    pub fn available() -> Vec<Path> {
        let mut paths = vec![Path::Scalar];
        paths.extend(Path::detect());
        paths
    }

    /// `scalar`, `avx2`.
    pub fn name(self) -> &'static str {
        match self {
            Path::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Path::Avx2(_) => "avx2",
        }
    }

    /// Runs a kernel with this path's instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Path::Scalar => kernel.scalar(),
            #[cfg(target_arch = "x86_64")]
            Path::Avx2(avx2) => avx2.run(kernel),
        }
    }
}
