//! The floating-point environment of the calling thread.
//!
//! The profile needs rounding to nearest even, and subnormals kept both as inputs and as results. Both are set per
//! thread, and a library built with `-ffast-math` may change them behind our back when it is loaded or called.

/// True if the calling thread rounds to nearest even and neither flushes subnormal results to zero nor reads subnormal
/// operands as zero. A node must not vote for what it computed in any other environment.
///
/// [`Pool::float_environment_ok`](crate::Pool::float_environment_ok) covers a pool's workers too.
pub fn float_environment_ok() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        mxcsr_keeps_bits(mxcsr())
    }
    #[cfg(target_arch = "aarch64")]
    {
        fpcr_keeps_bits(fpcr())
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        arithmetic_is_standard()
    }
}

#[cfg(target_arch = "x86_64")]
fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: `stmxcsr` writes four bytes through the pointer, which is `value`, and touches nothing else. SSE is part
    // of x86-64.
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags));
    }
    value
}

/// Bit 6 reads subnormals as zero, bits 13 and 14 choose the rounding, bit 15 flushes results to zero.
#[cfg(target_arch = "x86_64")]
const fn mxcsr_keeps_bits(mxcsr: u32) -> bool {
    const CHANGES_BITS: u32 = 1 << 6 | 0b11 << 13 | 1 << 15;
    mxcsr & CHANGES_BITS == 0
}

#[cfg(target_arch = "aarch64")]
fn fpcr() -> u64 {
    let value: u64;
    // SAFETY: reading FPCR is allowed at every privilege level and touches no memory.
    unsafe {
        std::arch::asm!("mrs {}, fpcr", out(reg) value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// Bits 0 (FIZ), 1 (AH), 19 (FZ16) and 24 (FZ) change subnormals, bits 22 and 23 choose the rounding.
#[cfg(target_arch = "aarch64")]
const fn fpcr_keeps_bits(fpcr: u64) -> bool {
    const CHANGES_BITS: u64 = 0b11 | 1 << 19 | 0b11 << 22 | 1 << 24;
    fpcr & CHANGES_BITS == 0
}

/// Judges the environment by results, where its register is not known.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn arithmetic_is_standard() -> bool {
    use std::hint::black_box;
    let tiny = black_box(f32::from_bits(1));
    let keeps_subnormals = black_box(tiny + tiny).to_bits() == 2 && black_box(f32::MIN_POSITIVE) * 0.5 > 0.0;
    let half_ulp = black_box(f32::EPSILON / 2.0);
    keeps_subnormals && 1.0 + half_ulp == 1.0 && -1.0 - half_ulp == -1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_thread_is_fine() {
        assert!(float_environment_ok());
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_setting_that_changes_bits_is_seen() {
        const DEFAULT: u32 = 0x1f80;
        assert!(mxcsr_keeps_bits(DEFAULT));
        assert!(mxcsr_keeps_bits(DEFAULT | 0x3f), "sticky flags only record");
        for change in [1 << 6, 1 << 13, 2 << 13, 3 << 13, 1 << 15] {
            assert!(!mxcsr_keeps_bits(DEFAULT | change), "{change:#x}");
        }
    }
}
