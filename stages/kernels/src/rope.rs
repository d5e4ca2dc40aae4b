//! Rotary position embeddings, with element `i` of a head paired with element `i + head_dim / 2` (Llama, GPT-NeoX).
//!
//! Invariants:
//! - Tables are made in f64 with the `libm` crate, whose source is part of the build, and rounded once to f32. A golden
//!   digest in the tests holds them still.
//! - A rotation is `x0 · c - x1 · s`, `x0 · s + x1 · c`, each product rounded. There is no fma in it, so plain Rust has
//!   the same bits on every path.

/// Rotations by position, `[positions, head_dim / 2]` each of cosines and sines.
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// How a model stretches its rotations beyond the positions it was trained on. Formulas as in Hugging Face transformers,
/// `modeling_rope_utils.py`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1 in practice.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// At least 1 in practice.
        factor: f64,
        /// Frequencies of fewer turns than this over `original_positions` are divided.
        low_freq_factor: f64,
        /// Frequencies of more turns than this over `original_positions` are kept.
        high_freq_factor: f64,
        /// Positions the model was trained on first.
        original_positions: u32,
    },
}

/// Why there is no such table.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RopeError {
    /// Elements are rotated in pairs.
    #[error("a head of {0} elements cannot be rotated: the number must be even and positive")]
    HeadDim(usize),
    /// The base must be finite and positive.
    #[error("the rotation base {0} is not a finite positive number")]
    Theta(f64),
    /// There must be one finite positive factor for each frequency.
    #[error("the {0} factors of the rotation's frequencies are not one finite positive number for each")]
    Factors(usize),
    /// The scaling's numbers make no frequencies.
    #[error("the rotation scaling {0:?} has a factor that is not finite and positive, or bounds in the wrong order")]
    Scaling(RopeScaling),
    /// The table would be larger than [`RopeTable::ELEMENTS_MAX`].
    #[error("a rotation table of {positions} positions for heads of {head_dim} elements is too large")]
    TooLarge {
        /// Positions asked for.
        positions: usize,
        /// Elements of a head.
        head_dim: usize,
    },
}

impl RopeTable {
    /// Cosines, and sines, that a table may hold: 1 GiB of each.
    pub const ELEMENTS_MAX: usize = 1 << 28;

    /// The table for positions below `positions_max` and heads of `head_dim` elements, at base `theta`.
    ///
    /// # Errors
    /// If the numbers describe no rotation, or one too large.
    pub fn new(
        head_dim: usize,
        theta: f64,
        positions_max: usize,
        scaling: RopeScaling,
    ) -> Result<RopeTable, RopeError> {
        Self::with_factors(head_dim, theta, positions_max, scaling, None)
    }

    /// As [`RopeTable::new`], each frequency divided by a factor of its own as well, `[head_dim / 2]`.
    ///
    /// # Errors
    /// If the numbers describe no rotation, or one too large.
    pub fn with_factors(
        head_dim: usize,
        theta: f64,
        positions_max: usize,
        scaling: RopeScaling,
        factors: Option<&[f32]>,
    ) -> Result<RopeTable, RopeError> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(RopeError::HeadDim(head_dim));
        }
        if !(theta.is_finite() && theta > 0.0) {
            return Err(RopeError::Theta(theta));
        }
        if !scaling.is_sound() {
            return Err(RopeError::Scaling(scaling));
        }
        let half = head_dim / 2;
        let elements = positions_max
            .checked_mul(half)
            .filter(|elements| *elements <= Self::ELEMENTS_MAX)
            .ok_or(RopeError::TooLarge { positions: positions_max, head_dim })?;
        let mut frequencies: Vec<f64> = (0..half)
            .map(|i| {
                let exponent = (2 * i) as f64 / head_dim as f64;
                scaling.apply(1.0 / libm::pow(theta, exponent))
            })
            .collect();
        if let Some(factors) = factors {
            if factors.len() != half || !factors.iter().all(|factor| factor.is_finite() && *factor > 0.0) {
                return Err(RopeError::Factors(factors.len()));
            }
            for (frequency, factor) in frequencies.iter_mut().zip(factors) {
                *frequency /= f64::from(*factor);
            }
        }
        let mut table = RopeTable { half, cos: Vec::with_capacity(elements), sin: Vec::with_capacity(elements) };
        for position in 0..positions_max {
            for frequency in &frequencies {
                let (sin, cos) = libm::sincos(position as f64 * frequency);
                table.cos.push(cos as f32);
                table.sin.push(sin as f32);
            }
        }
        Ok(table)
    }

    /// Positions in the table: all below this.
    pub fn positions_max(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Elements of a head.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// Memory that the table takes.
    pub fn bytes(&self) -> usize {
        size_of_val(self.cos.as_slice()) + size_of_val(self.sin.as_slice())
    }
}

impl std::fmt::Debug for RopeTable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "RopeTable {} positions x {}", self.positions_max(), self.head_dim())
    }
}

impl RopeScaling {
    fn is_sound(self) -> bool {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        match self {
            RopeScaling::Default => true,
            RopeScaling::Linear { factor } => positive(factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                positive(factor)
                    && positive(low_freq_factor)
                    && positive(high_freq_factor)
                    && low_freq_factor < high_freq_factor
                    && original_positions > 0
            }
        }
    }

    /// The frequency, in turns of 2π per position, that takes the place of this one.
    pub fn apply(self, frequency: f64) -> f64 {
        match self {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let original = f64::from(original_positions);
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength < original / high_freq_factor {
                    frequency
                } else if wavelength > original / low_freq_factor {
                    frequency / factor
                } else {
                    let turns = original / wavelength;
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// Rotates each head of each row of `x` `[n, heads, head_dim]` by the row's position, in place.
///
/// # Panics
/// If the shapes do not fit, or the table does not reach a position.
pub fn rope(x: &mut [f32], heads: usize, positions: &[u32], table: &RopeTable) {
    let width = heads * table.head_dim();
    assert_eq!(
        x.len(),
        positions.len() * width,
        "x is {} rows of {heads} heads of {}",
        positions.len(),
        table.head_dim()
    );
    if width == 0 {
        return;
    }
    for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
        let start = position as usize * table.half;
        let cos = &table.cos[start..][..table.half];
        let sin = &table.sin[start..][..table.half];
        for head in row.chunks_exact_mut(table.head_dim()) {
            let (first, second) = head.split_at_mut(table.half);
            for (((x0, x1), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let rotated = (*x0 * c - *x1 * s, *x0 * s + *x1 * c);
                (*x0, *x1) = rotated;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn factors_divide_frequencies() {
        let bits = |table: &RopeTable| table.cos.iter().chain(&table.sin).map(|x| x.to_bits()).collect::<Vec<_>>();
        let linear = RopeTable::new(8, 1e4, 50, RopeScaling::Linear { factor: 2.0 }).unwrap();
        let with = |factors: &[f32]| RopeTable::with_factors(8, 1e4, 50, RopeScaling::Default, Some(factors));
        assert_eq!(bits(&with(&[2.0; 4]).unwrap()), bits(&linear));
        for wrong in [&[2.0; 3][..], &[2.0, 2.0, 0.0, 2.0], &[2.0, f32::NAN, 2.0, 2.0], &[-1.0; 4]] {
            assert_eq!(with(wrong).unwrap_err(), RopeError::Factors(wrong.len()));
        }
    }

    /// If this fails, the tables' bits changed: a new `libm`, say. Keep the old bits, or give the profile a new name.
    #[test]
    fn tables_have_their_golden_digests() {
        const GOLDEN: [&str; 3] = [
            "e3562b5cd021841e59d0048972fe1d93bc9b0e17466092f422a8c29ab421fcd6",
            "968374bc590fc42d6c3a5ddd3a8ab31253c3089c890a43fc4db41fa1cd3196c6",
            "bc236aaf39c720fb92d38e78583c7a2652509fe0a1a9567b9ba432ac33eef404",
        ];
        let llama3 =
            RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 8192 };
        let cases = [
            (32, 10_000.0, 1024, RopeScaling::Default),
            (80, 10_000.0, 4096, RopeScaling::Linear { factor: 2.5 }),
            (64, 500_000.0, 16_384, llama3),
        ];
        let mut found = Vec::new();
        for (head_dim, theta, positions, scaling) in cases {
            let table = RopeTable::new(head_dim, theta, positions, scaling).unwrap();
            let mut hasher = Sha256::new();
            for number in table.cos.iter().chain(&table.sin) {
                hasher.update(number.to_bits().to_le_bytes());
            }
            let digest = hasher.finalize();
            found.push(digest.iter().map(|b| format!("{b:02x}")).collect::<String>());
        }
        assert_eq!(found, GOLDEN);
    }
}
