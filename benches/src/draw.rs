//! Random numbers of a load: drawn from a seed and an index, so that a run can be repeated exactly.
//!
//! It refuses to be unpredictable: nothing here guards a secret.

/// A sequence of draws (splitmix64).
#[derive(Debug, Clone)]
pub(crate) struct Draw(u64);

impl Draw {
    /// The sequence with this number, of this seed. Sequences of different numbers do not resemble each other.
    pub(crate) fn new(seed: u64, number: u64) -> Self {
        let mut draw = Self(seed);
        let start = draw.next();
        let mut draw = Self(start ^ number.wrapping_mul(0xd134_2543_de82_ef95));
        draw.next();
        draw
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 up to but not including 1.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// From `from` up to and including `to`.
    pub(crate) fn within(&mut self, from: u32, to: u32) -> u32 {
        let width = u64::from(to.saturating_sub(from)) + 1;
        from + u32::try_from(self.next() % width).unwrap_or(0)
    }

    /// The gap to the next arrival of a Poisson process with this mean gap.
    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -(1.0 - self.unit()).ln() * mean
    }

    /// Normally distributed, with mean 0 and deviation 1 (Box and Muller, 1958).
    pub(crate) fn normal(&mut self) -> f64 {
        let (radius, angle) = ((-2.0 * (1.0 - self.unit()).ln()).sqrt(), std::f64::consts::TAU * self.unit());
        radius * angle.cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_repeats_and_another_differs() {
        let take = |seed, number| {
            let mut draw = Draw::new(seed, number);
            [draw.next(), draw.next(), draw.next()]
        };
        assert_eq!(take(1, 2), take(1, 2));
        assert_ne!(take(1, 2), take(1, 3));
        assert_ne!(take(1, 2), take(2, 2));
    }

    #[test]
    fn draws_have_the_mean_they_should_have() {
        let mut draw = Draw::new(7, 0);
        let count = 20_000;
        let mean = |of: &mut dyn FnMut() -> f64| (0..count).map(|_| of()).sum::<f64>() / f64::from(count);
        assert!((mean(&mut || draw.unit()) - 0.5).abs() < 0.01);
        assert!((mean(&mut || draw.exponential(3.0)) - 3.0).abs() < 0.1);
        assert!(mean(&mut || draw.normal()).abs() < 0.03);
        assert!((0..1000).all(|_| (3..=5).contains(&draw.within(3, 5))));
    }
}
