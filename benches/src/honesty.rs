//! The harness held to account: it must find what was done to a cluster on purpose.
//!
//! A stage that takes 5 ms more for each item must be named as the bottleneck, and its service time must be read right. A
//! server that is stopped in the middle must show in the latencies of all requests that were due meanwhile.
//!
//! On a busy machine a stage that waits for 5 ms takes longer, so what it really took is measured in the stage as well, and
//! the reading is held to that.
//!
//! It refuses to count what a slow machine adds as the harness's merit or fault.

mod slow;

use std::fmt::{self, Display, Formatter};
use std::io::BufRead;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use butterfly_engine::clock::{Clock, RealClock};
use clap::Args;
use serde::Serialize;

use crate::client::Gateway;
use crate::report::Report;
use crate::run::LoadArgs;
use crate::target::Target;

/// How far a reading may be from the truth.
const TOLERANCE: f64 = 0.05;
/// What the slow stage takes more for each item.
const SLOWED_BY: Duration = Duration::from_millis(5);
/// How long a server is stopped.
const STOPPED_FOR: Duration = Duration::from_secs(2);
/// How long it runs before that.
const STOPPED_AFTER: Duration = Duration::from_secs(2);
/// Requests per second, and seconds, of the load on the server that is stopped.
const STOPPED_LOAD: (f64, f64) = (50.0, 8.0);

/// `butterfly bench selftest`.
#[derive(Args, Debug, Clone)]
pub(crate) struct SelftestArgs {
    /// Requests per second for the slowed stage, which takes at most 200.
    #[arg(long, default_value_t = 400.0)]
    rate: f64,
    /// Seconds of load.
    #[arg(long, default_value_t = 8.0)]
    duration: f64,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Verdict {
    pub(crate) checks: Vec<Check>,
}

/// One reading and what it should have been.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Check {
    name: &'static str,
    expected: String,
    found: String,
    pub(crate) holds: bool,
}

impl Verdict {
    pub(crate) fn holds(&self) -> bool {
        self.checks.iter().all(|check| check.holds)
    }
}

impl SelftestArgs {
    /// Runs every check.
    pub(crate) async fn run(&self) -> anyhow::Result<Verdict> {
        let mut checks = self.slowed().await?;
        checks.extend(stopped().await?);
        Ok(Verdict { checks })
    }

    async fn slowed(&self) -> anyhow::Result<Vec<Check>> {
        let (loopback, truth) = slow::cluster(SLOWED_BY);
        let target = Target::start_with(&loopback, "three nodes, one stage slowed by 5 ms".into()).await?;
        let load = LoadArgs::plain(self.rate, self.duration);
        let ready = load.ready_on(target).await?;
        let report = ready.at_rate(self.rate).await?;
        ready.stop().await?;
        let service = report.nodes.first().and_then(|node| node.stages.iter().find(|stage| stage.name == slow::NAME));
        let service = service.and_then(|stage| stage.service_ms).context("the slowed stage served nothing")?;
        let real = truth.mean_ms().context("the slowed stage measured nothing")?;
        let named = report.bottleneck.as_ref();
        Ok(vec![
            Check {
                name: "the slowed stage is named as the bottleneck",
                expected: slow::NAME.into(),
                found: named.map_or_else(|| "none".into(), |found| found.sentence.clone()),
                holds: named.is_some_and(|found| found.stage == slow::NAME && found.is_limit),
            },
            near("its mean service time is what the stage itself measured (ms)", real, service.mean),
        ])
    }
}

/// Stops a server process for a while, under a load that goes on.
async fn stopped() -> anyhow::Result<Vec<Check>> {
    let (rate, duration) = STOPPED_LOAD;
    let server = Server::start()?;
    let target = Target::remote(&server.url, Gateway::new(&server.url, None)?);
    let load = LoadArgs::plain(rate, duration);
    let ready = load.ready_on(target).await?;
    let clock = RealClock::new();
    let stall = async {
        // The warm-up comes first; the stall lies well within the load that is measured.
        clock.sleep(load.warm_up() + STOPPED_AFTER).await;
        server.signal("STOP")?;
        let begin = clock.now();
        clock.sleep(STOPPED_FOR).await;
        server.signal("CONT")?;
        anyhow::Ok(clock.now().saturating_sub(begin))
    };
    let (report, stalled) = futures::future::try_join(ready.at_rate(rate), stall).await?;
    ready.stop().await?;
    Ok(vec![
        Check {
            name: "every request is answered in the end",
            expected: report.sent.to_string(),
            found: match &report.first_error {
                Some(error) => format!("{}; first failure: {error}", report.ok),
                None => report.ok.to_string(),
            },
            holds: report.ok == report.sent,
        },
        at_least(
            "the longest latency (ms) is no shorter than the stall",
            stalled.as_secs_f64() * 1000.0,
            longest(&report),
        ),
        at_least(
            "what was due in the first half of the stall took longer than half of it",
            rate * stalled.as_secs_f64() / 2.0,
            longer_than(&report, stalled / 2),
        ),
    ])
}

fn longest(report: &Report) -> f64 {
    report.latency_ms.get("e2e").map_or(0.0, |q| q.max)
}

fn longer_than(report: &Report, limit: Duration) -> f64 {
    let limit_ms = limit.as_secs_f64() * 1000.0;
    report.raw.rows.iter().filter(|row| row.error.is_none() && row.done_ms - row.scheduled_ms > limit_ms).count() as f64
}

fn near(name: &'static str, expected: f64, found: f64) -> Check {
    let off = (found / expected - 1.0) * 100.0;
    Check {
        name,
        expected: format!("{expected:.3}, within {:.0} %", TOLERANCE * 100.0),
        found: format!("{found:.3} ({off:+.2} %)"),
        holds: (found - expected).abs() <= expected * TOLERANCE,
    }
}

/// What a slow machine may make more, and a dishonest reading makes less.
fn at_least(name: &'static str, expected: f64, found: f64) -> Check {
    Check {
        name,
        expected: format!("{expected:.0} or more, within {:.0} %", TOLERANCE * 100.0),
        found: format!("{found:.0}"),
        holds: found >= expected * (1.0 - TOLERANCE),
    }
}

/// A cluster in a process of its own, which ends with its standard input.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start() -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("host")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a cluster in a process of its own")?;
        let output = child.stdout.take().context("the cluster's process has no output")?;
        let mut url = String::new();
        std::io::BufReader::new(output).read_line(&mut url)?;
        let server = Self { child, url: url.trim().to_owned() };
        anyhow::ensure!(!server.url.is_empty(), "the cluster's process did not start");
        Ok(server)
    }

    fn signal(&self, name: &str) -> anyhow::Result<()> {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status()?;
        anyhow::ensure!(status.success(), "sending SIG{name} failed: {status}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A stopped process does not see the end of its input.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Display for Verdict {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let verdict = if check.holds { "holds" } else { "FAILS" };
            writeln!(
                f,
                "{verdict}  {}\n       expected {}\n       found    {}",
                check.name, check.expected, check.found
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_is_near_within_five_percent() {
        assert!(near("x", 5.0, 5.24).holds && near("x", 5.0, 4.76).holds);
        assert!(!near("x", 5.0, 5.26).holds && !near("x", 5.0, 4.74).holds && !near("x", 5.0, f64::NAN).holds);
    }

    /// How long anything takes depends on the machine; which stage holds the others up does not.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_stage_that_is_slowed_on_purpose_is_named() {
        let (loopback, truth) = slow::cluster(Duration::from_millis(20));
        let target = Target::start_with(&loopback, "a test".into()).await.unwrap();
        let load = LoadArgs::plain(1.0, 1.0);
        let ready = load.ready_on(target).await.unwrap();
        let report = ready.in_closed_loop(32).await.unwrap();
        ready.stop().await.unwrap();
        let found = report.bottleneck.clone().unwrap();
        assert_eq!((found.stage.as_str(), found.is_limit), (slow::NAME, true), "{}", found.sentence);
        assert!(truth.mean_ms().unwrap() >= 20.0);
        let stage = report.nodes[0].stages.iter().find(|stage| stage.name == slow::NAME).unwrap();
        assert!(stage.service_ms.unwrap().p50 >= 19.8, "it cannot read as faster than it is: {stage:?}");
    }
}
