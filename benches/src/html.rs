//! `report.html`: one page that needs nothing from elsewhere, in light and in dark.
//!
//! It refuses to run anything: there is no script in it, so a page that someone was sent shows, and does, no more than this.

use std::fmt::Write as _;

use crate::plot::{self, Axis, Bar, Line, Scale, escape};
use crate::report::{LATENCIES, Report};
use crate::sweep::Sweep;

const STYLE: &str = include_str!("html/page.css");
/// Edges that are plotted: the fullest.
const EDGES_SHOWN_MAX: usize = 16;

const MS: Axis = Axis { label: "milliseconds", scale: Scale::Log };
const PER_SECOND: Axis = Axis { label: "per second", scale: Scale::Linear };
const SECONDS: Axis = Axis { label: "seconds since the begin, by scheduled send", scale: Scale::Linear };
const TARGET: Axis = Axis { label: "target rate, per second", scale: Scale::Linear };

/// The page of one run.
pub(crate) fn run(report: &Report) -> String {
    let title = format!("{} at {}", report.run.workload, rate(report.target_rate));
    let mut body = figures(report);
    body.push_str(&latency_table(report));
    for plot in [percentiles(report), over_time(report), throughput(report), states(report), fills(report)] {
        body.push_str(&plot);
    }
    body.push_str(&environment(report));
    page(&title, &report.run.target, &body)
}

/// The page of a sweep.
pub(crate) fn sweep(sweep: &Sweep) -> String {
    let Some(first) = sweep.steps.first() else { return page("sweep", "nothing was run", "") };
    let mut body = format!("<p class=\"lead\">{}</p>", code(&sweep.verdict()));
    let points = |of: &dyn Fn(&Report) -> Option<f64>| -> Vec<(f64, f64)> {
        let mut points: Vec<(f64, f64)> =
            sweep.steps.iter().filter_map(|step| Some((step.report.target_rate?, of(&step.report)?))).collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        points
    };
    let throughput = [
        Line::new("done", points(&|report| Some(report.done_rate))),
        Line::new("sent", points(&|report| Some(report.sent_rate))),
        Line::new("goodput", points(&|report| report.goodput.map(|goodput| goodput.rate))),
        Line::new("target", points(&|report| report.target_rate)).dashed(),
    ];
    body.push_str(&plot::lines("Throughput by target", TARGET, PER_SECOND, &shown(&throughput)));
    let quantile = |name: &'static str, of: fn(&crate::report::Quantiles) -> f64| {
        points(&move |report| report.latency_ms.get(name).map(of))
    };
    let latency = [
        Line::new("e2e p50", quantile("e2e", |q| q.p50)),
        Line::new("e2e p99", quantile("e2e", |q| q.p99)),
        Line::new("TTFT p99", quantile("ttft", |q| q.p99)),
        Line::new("ITL p99", quantile("itl", |q| q.p99)),
    ];
    body.push_str(&plot::lines("Latency by target", TARGET, MS, &shown(&latency)));
    body.push_str(&steps(sweep));
    if let Some(knee) = sweep.knee_report() {
        body.push_str(&format!("<h2>At the knee: {}</h2>", rate(knee.target_rate)));
        for part in [latency_table(knee), percentiles(knee), states(knee), fills(knee)] {
            body.push_str(&part);
        }
    }
    body.push_str(&environment(first_report(first)));
    page(&format!("sweep of {}", first.report.run.workload), &first.report.run.target, &body)
}

fn first_report(step: &crate::sweep::Step) -> &Report {
    &step.report
}

fn shown(lines: &[Line]) -> Vec<Line> {
    lines.iter().filter(|line| !line.points.is_empty()).cloned().collect()
}

fn page(title: &str, subtitle: &str, body: &str) -> String {
    let (title, subtitle) = (escape(title), escape(subtitle));
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style></head>\
         <body><main><header><h1>{title}</h1><p>{subtitle}</p></header>{body}</main></body></html>\n"
    )
}

fn figures(report: &Report) -> String {
    let mut html = String::new();
    if let Some(bottleneck) = &report.bottleneck {
        let _ = write!(html, "<p class=\"lead\">{}</p>", code(&bottleneck.sentence));
    }
    let mut cards: Vec<(&str, String)> = vec![
        ("target", rate(report.target_rate)),
        ("sent", rate(Some(report.sent_rate))),
        ("done", rate(Some(report.done_rate))),
        ("ok of sent", format!("{} of {}", report.ok, report.sent)),
    ];
    if let Some(goodput) = &report.goodput {
        cards.push(("goodput", format!("{} ({:.1} %)", rate(Some(goodput.rate)), goodput.share * 100.0)));
    }
    if report.tokens_out > 0 {
        cards.push(("tokens out", rate(Some(report.tokens_out_rate))));
    }
    if report.tokens_in > 0 {
        cards.push(("tokens in, out", format!("{}, {}", report.tokens_in, report.tokens_out)));
    }
    let checked = report.verification.receipts_checked;
    cards.push(("receipts verified", checked.to_string()));
    if let Some(share) = report.verification.share_of_work {
        cards.push(("work on verifying", format!("{:.1} %", share * 100.0)));
    }
    if let Some(ratio) = report.verification.overhead_ratio {
        cards.push(("against one unchecked node", format!("{ratio:.2} x")));
    }
    if let Some(ratio) = report.partition_cache_hit_ratio {
        cards.push(("partition cache hits", format!("{:.2} %", ratio * 100.0)));
    }
    html.push_str("<dl class=\"cards\">");
    for (name, value) in cards {
        let _ = write!(html, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
    }
    html.push_str("</dl>");
    if !report.errors.is_empty() {
        let list: Vec<String> =
            report.errors.iter().map(|(code, count)| format!("{count} x {}", escape(code))).collect();
        let first = report.first_error.as_deref().map(escape).unwrap_or_default();
        let _ = write!(html, "<p class=\"failed\">failed: {}. First: {first}</p>", list.join(", "));
    }
    html
}

fn latency_table(report: &Report) -> String {
    let mut html = String::from(
        "<table><thead><tr><th>milliseconds</th><th>count</th><th>mean</th><th>p50</th><th>p90</th><th>p95</th><th>p99</th>\
         <th>p99.9</th><th>max</th></tr></thead><tbody>",
    );
    for (name, title) in LATENCIES {
        let Some(q) = report.latency_ms.get(name) else { continue };
        let _ = write!(html, "<tr><th>{title}</th><td>{}</td>", q.count);
        for value in [q.mean, q.p50, q.p90, q.p95, q.p99, q.p99_9, q.max] {
            let _ = write!(html, "<td>{value:.2}</td>");
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table><p class=\"note\">From the scheduled send, but for the gaps between tokens.");
    if report.itl_is_per_chunk {
        html.push_str(" The server does not tell how many tokens a chunk has: gaps are between chunks.");
    }
    if report.target_rate.is_none() {
        html.push_str(" A closed loop waits for the server, so a stall hides behind the requests that were not sent.");
    }
    html + "</p>"
}

fn percentiles(report: &Report) -> String {
    let names = [
        ("ttft", "TTFT"),
        ("itl", "ITL"),
        ("tpot", "TPOT"),
        ("proof_wait", "last token to receipt"),
        ("e2e", "end to end"),
    ];
    let lines = names.iter().filter_map(|(name, title)| {
        let (_, histogram) =
            report.raw.histograms.iter().find(|(of, histogram)| of == name && !histogram.is_empty())?;
        // So many values say nothing about quantiles beyond this one; the largest is shown there.
        let last = 1.0 - 0.5 / histogram.len() as f64;
        let points = histogram
            .iter_quantiles(8)
            .map(|step| (step.quantile().min(last), step.value_iterated_to() as f64 / 1000.0));
        Some(Line::new(*title, points.collect()))
    });
    let axis = Axis { label: "percentile", scale: Scale::Nines };
    plot::lines("Latency by percentile", axis, MS, &lines.collect::<Vec<_>>())
}

fn over_time(report: &Report) -> String {
    let points = |of: fn(&crate::report::Second) -> Option<f64>| -> Vec<(f64, f64)> {
        report.seconds.iter().filter_map(|second| Some((second.second as f64, of(second)?))).collect()
    };
    let lines = [
        Line::new("p50", points(|second| second.p50_ms)),
        Line::new("p99", points(|second| second.p99_ms)),
        Line::new("max", points(|second| second.max_ms)),
    ];
    plot::lines("End-to-end latency over time", SECONDS, MS, &lines)
}

fn throughput(report: &Report) -> String {
    let points = |of: fn(&crate::report::Second) -> u64, until: usize| -> Vec<(f64, f64)> {
        report.seconds.iter().take(until).map(|second| (second.second as f64, of(second) as f64)).collect()
    };
    // Answers may come when nothing is due any more.
    let due = report.seconds.iter().rposition(|second| second.scheduled > 0).map_or(0, |last| last + 1);
    let mut lines = vec![
        Line::new("done", points(|second| second.done, usize::MAX)),
        Line::new("scheduled", points(|second| second.scheduled, due)),
    ];
    if report.failed() > 0 {
        lines.push(Line::new("failed", points(|second| second.failed, due)));
    }
    if let Some(rate) = report.target_rate {
        let last = report.seconds.get(due.saturating_sub(1)).map_or(0, |second| second.second) as f64;
        lines.push(Line::new("target", vec![(0.0, rate), (last, rate)]).dashed());
    }
    plot::lines("Throughput over time", SECONDS, PER_SECOND, &lines)
}

fn states(report: &Report) -> String {
    let bars = report.nodes.iter().flat_map(|node| {
        node.stages.iter().filter(|stage| node.accounts_for(stage) && stage.shares() != [0.0; 4]).map(|stage| {
            let [busy, starved, blocked, verifying] = stage.shares();
            Bar {
                label: format!("{} {}", node.name, stage.name),
                parts: vec![busy, verifying, blocked, starved],
                mark: None,
                note: format!("{} items", stage.items),
            }
        })
    });
    plot::bars(
        "What stages do with their time",
        &["busy", "verifying", "blocked", "starved"],
        &bars.collect::<Vec<_>>(),
    )
}

fn fills(report: &Report) -> String {
    let mut edges: Vec<_> =
        report.nodes.iter().flat_map(|node| node.edges.iter().map(move |edge| (node, edge))).collect();
    edges.retain(|(_, edge)| edge.bytes > 0);
    edges.sort_by(|(_, one), (_, other)| {
        (other.fill_max, other.fill_mean)
            .partial_cmp(&(one.fill_max, one.fill_mean))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    let bars = edges.iter().take(EDGES_SHOWN_MAX).map(|(node, edge)| Bar {
        label: format!("{} {} → {}", node.name, edge.start_stage(), edge.end_stage()),
        parts: vec![edge.fill_mean],
        mark: (edge.fill_max > 0.0).then_some(edge.fill_max),
        note: format!("of {}", edge.capacity_items),
    });
    plot::bars("How full edges are: the mean, and the most as a mark", &["mean fill"], &bars.collect::<Vec<_>>())
}

fn steps(sweep: &Sweep) -> String {
    let mut html = String::from(
        "<table><thead><tr><th>target /s</th><th>sent</th><th>done</th><th>goodput</th><th>failed</th><th>e2e p50</th>\
         <th>e2e p99</th><th>kept up</th></tr></thead><tbody>",
    );
    for step in &sweep.steps {
        let report = &step.report;
        let e2e = report.latency_ms.get("e2e");
        let cell = |value: Option<f64>| value.map_or_else(|| "–".into(), |value| format!("{value:.1}"));
        let _ = write!(
            html,
            "<tr><td>{}</td><td>{:.1}</td><td>{:.1}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            cell(report.target_rate),
            report.sent_rate,
            report.done_rate,
            cell(report.goodput.map(|goodput| goodput.rate)),
            report.failed(),
            cell(e2e.map(|q| q.p50)),
            cell(e2e.map(|q| q.p99)),
            if step.keeps_up { "yes" } else { "no" },
        );
    }
    html + "</tbody></table>"
}

fn environment(report: &Report) -> String {
    let (of, run) = (&report.environment, &report.run);
    let rows = [
        ("command", of.command.clone()),
        (
            "program",
            format!(
                "butterfly-bench {}, {} build, commit {}",
                of.version,
                of.build,
                of.commit.as_deref().unwrap_or("unknown")
            ),
        ),
        ("machine", format!("{}, {} threads, {}, {}", of.cpu, of.cores, of.instructions, of.os)),
        (
            "load",
            format!(
                "{}, {} s after {} s of warm-up, {} connections, seed {}",
                run.arrivals, run.duration_s, run.warm_up_s, run.connections, run.seed
            ),
        ),
        ("lengths", format!("prompts of {}, outputs of {} tokens", run.prompt_tokens, run.output_tokens)),
        ("objectives", run.slo.clone().unwrap_or_else(|| "none".into())),
    ];
    let mut html = String::from("<table class=\"about\"><tbody>");
    for (name, value) in rows {
        let _ = write!(html, "<tr><th>{name}</th><td>{}</td></tr>", escape(&value));
    }
    html + "</tbody></table>"
}

fn rate(rate: Option<f64>) -> String {
    rate.map_or_else(|| "closed loop".into(), |rate| format!("{rate:.1}/s"))
}

/// Text with `words` set as code.
fn code(text: &str) -> String {
    let parts = escape(text);
    let mut html = String::new();
    for (index, part) in parts.split('`').enumerate() {
        html.push_str(&if index % 2 == 1 { format!("<code>{part}</code>") } else { part.to_owned() });
    }
    html
}
