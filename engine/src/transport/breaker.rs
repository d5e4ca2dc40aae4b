//! When to try again: retries with growing pauses, and a circuit breaker after repeated failure. Sans-IO.
//!
//! Closed: after a failure try at once, then after 100 ms, then after 200 ms. A further failure opens the circuit: no
//! attempt for a cooldown that doubles up to a limit. After it the circuit is half-open: one attempt decides.
//!
//! It refuses to know what is tried, and it reads no clock.

use std::time::Duration;

/// Pauses after the first, second and third failure in a row.
const RETRY_PAUSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(200)];
/// The first cooldown of an open circuit.
const COOLDOWN_MIN: Duration = Duration::from_millis(400);
/// The longest cooldown.
const COOLDOWN_MAX: Duration = Duration::from_secs(2);

/// Whether attempts are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Circuit {
    /// Yes, with short pauses.
    Closed,
    /// Not before `until`.
    Open {
        /// The clock's moment.
        until: Duration,
    },
    /// One, which decides.
    HalfOpen,
}

/// The breaker of one peer.
#[derive(Clone, Debug)]
pub(super) struct Breaker {
    circuit: Circuit,
    failures: usize,
    not_before: Duration,
    cooldown: Duration,
}

impl Breaker {
    pub(super) fn new() -> Self {
        Self { circuit: Circuit::Closed, failures: 0, not_before: Duration::ZERO, cooldown: COOLDOWN_MIN }
    }

    pub(super) fn circuit(&self) -> Circuit {
        self.circuit
    }

    /// How long to wait before the next attempt; zero means now. An open circuit whose cooldown is over becomes half-open.
    pub(super) fn pause(&mut self, now: Duration) -> Duration {
        match self.circuit {
            Circuit::Open { until } if now >= until => {
                self.circuit = Circuit::HalfOpen;
                Duration::ZERO
            }
            Circuit::Open { until } => until.saturating_sub(now),
            Circuit::Closed | Circuit::HalfOpen => self.not_before.saturating_sub(now),
        }
    }

    /// An attempt succeeded, so the next failure is the first in a row.
    pub(super) fn succeeded(&mut self) {
        *self = Self::new();
    }

    /// An attempt failed at `now`.
    pub(super) fn failed(&mut self, now: Duration) {
        let pause = RETRY_PAUSES.get(self.failures).copied();
        self.failures = self.failures.saturating_add(1);
        match (self.circuit, pause) {
            (Circuit::Closed, Some(pause)) => self.not_before = now.saturating_add(pause),
            _ => {
                self.circuit = Circuit::Open { until: now.saturating_add(self.cooldown) };
                self.cooldown = self.cooldown.saturating_mul(2).min(COOLDOWN_MAX);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn retries_at_once_then_after_growing_pauses_then_opens() {
        let mut breaker = Breaker::new();
        let now = 1000 * MS;
        assert_eq!(breaker.pause(now), Duration::ZERO);
        for pause in [0, 100, 200] {
            breaker.failed(now);
            assert_eq!((breaker.circuit(), breaker.pause(now)), (Circuit::Closed, pause * MS));
        }
        breaker.failed(now);
        assert_eq!(breaker.circuit(), Circuit::Open { until: 1400 * MS });
        assert_eq!(breaker.pause(now + 399 * MS), MS);
    }

    #[test]
    fn one_attempt_decides_when_half_open() {
        let mut breaker = Breaker::new();
        let mut now = Duration::ZERO;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let pause = breaker.pause(now);
            now += pause;
            assert_eq!(breaker.pause(now), Duration::ZERO);
            pauses.push(pause.as_millis());
            breaker.failed(now);
        }
        assert_eq!(pauses, [0, 0, 100, 200, 400, 800, 1600, 2000, 2000]);
        now += breaker.pause(now);
        assert_eq!((breaker.pause(now), breaker.circuit()), (Duration::ZERO, Circuit::HalfOpen));
        breaker.succeeded();
        assert_eq!(breaker.circuit(), Circuit::Closed);
        breaker.failed(now);
        assert_eq!(breaker.pause(now), Duration::ZERO);
    }
}
