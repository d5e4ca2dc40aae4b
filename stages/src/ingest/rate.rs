//! How many requests a client may send.
//!
//! Clients are told apart by API key where there are keys, else by address; of an IPv6 address the first 64 bits count,
//! since the rest is the client's to choose.
//!
//! Invariants: the clients kept are bounded; when there are more, the newcomers share one limit instead of having none.
//!
//! It refuses to know what is asked.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use butterfly_engine::clock::Clock;
use governor::clock::Clock as _;
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};

/// Clients kept at most.
const CLIENTS_MAX: usize = 65_536;
/// How often idle clients are looked for when there are too many.
const FORGET_EVERY: Duration = Duration::from_secs(1);

/// Who is limited.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum RateKey {
    /// A client with an API key.
    Client(String),
    /// A client without, by address.
    Address(IpAddr),
    /// Whoever came when too many were kept.
    Others,
}

impl RateKey {
    /// An address as far as it names a client.
    #[must_use]
    pub(super) fn address(address: IpAddr) -> Self {
        Self::Address(match address.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
            address @ IpAddr::V4(_) => address,
        })
    }
}

/// The limit of each client.
pub(super) struct Rates {
    per_second: u32,
    clients_max: usize,
    limiter: RateLimiter<RateKey, HashMapStateStore<RateKey>, NodeClock, NoOpMiddleware<Duration>>,
    forgot: Mutex<Duration>,
}

impl Rates {
    /// `per_second` for each client, as many of which may come at once.
    #[must_use]
    pub(super) fn new(per_second: u32, clock: Arc<dyn Clock>) -> Self {
        Self::with_clients_max(per_second, clock, CLIENTS_MAX)
    }

    fn with_clients_max(per_second: u32, clock: Arc<dyn Clock>, clients_max: usize) -> Self {
        let quota = Quota::per_second(NonZeroU32::new(per_second).unwrap_or(NonZeroU32::MIN));
        let limiter = RateLimiter::hashmap_with_clock(quota, NodeClock(clock));
        Self { per_second, clients_max, limiter, forgot: Mutex::new(Duration::ZERO) }
    }

    /// Takes one request of a client.
    ///
    /// # Errors
    /// With the time after which the next is allowed.
    pub(super) fn check(&self, key: RateKey) -> Result<(), Duration> {
        let now = self.limiter.clock().now();
        let key = if self.has_room(now) { key } else { RateKey::Others };
        self.limiter.check_key(&key).map_err(|refused| refused.wait_time_from(now))
    }

    /// Requests per second and client.
    #[must_use]
    pub(super) fn per_second(&self) -> u32 {
        self.per_second
    }

    /// Whether another client can be kept, after idle ones were forgotten.
    fn has_room(&self, now: Duration) -> bool {
        if self.limiter.len() < self.clients_max {
            return true;
        }
        let mut forgot = self.forgot.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_sub(*forgot) >= FORGET_EVERY {
            *forgot = now;
            self.limiter.retain_recent();
        }
        self.limiter.len() < self.clients_max
    }
}

/// The node's time as the limiter reads it.
#[derive(Clone)]
struct NodeClock(Arc<dyn Clock>);

impl governor::clock::Clock for NodeClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.now()
    }
}

#[cfg(test)]
mod tests {
    use butterfly_engine::clock::ManualClock;

    use super::*;

    fn client(number: u8) -> RateKey {
        RateKey::address(IpAddr::from([10, 0, 0, number]))
    }

    #[test]
    fn each_client_has_its_own_limit_and_gets_it_back_with_time() {
        let clock = ManualClock::new(0);
        let rates = Rates::new(2, Arc::new(clock.clone()));
        assert!(rates.check(client(1)).is_ok());
        assert!(rates.check(client(1)).is_ok());
        let wait = rates.check(client(1)).unwrap_err();
        assert!(!wait.is_zero() && wait <= Duration::from_secs(1), "{wait:?}");
        assert!(rates.check(client(2)).is_ok());
        clock.advance(wait);
        assert!(rates.check(client(1)).is_ok());
    }

    #[test]
    fn when_too_many_clients_are_kept_newcomers_share_a_limit_and_idle_ones_are_forgotten() {
        let clock = ManualClock::new(0);
        let rates = Rates::with_clients_max(1, Arc::new(clock.clone()), 2);
        assert!(rates.check(client(1)).is_ok());
        assert!(rates.check(client(2)).is_ok());
        assert!(rates.check(client(3)).is_ok(), "the first of the others");
        assert!(rates.check(client(4)).is_err());
        clock.advance(Duration::from_secs(10));
        assert!(rates.check(client(4)).is_ok(), "the idle were forgotten");
        assert!(rates.limiter.len() <= 3);
    }

    #[test]
    fn an_ipv6_client_cannot_choose_a_new_address() {
        let address = |text: &str| RateKey::address(text.parse().unwrap());
        assert_eq!(address("2001:db8::1"), address("2001:db8::ffff:1"));
        assert_ne!(address("2001:db8::1"), address("2001:db8:0:1::1"));
        assert_eq!(address("::ffff:10.0.0.1"), client(1));
    }
}
