use std::time::Duration;

use super::*;
use crate::record::{Answered, Piece, Sample, Slo};
use crate::workload::{Ask, Kind};

fn run() -> Run {
    Run {
        target: "a test".into(),
        workload: "completions".into(),
        model: "m".into(),
        arrivals: "constant".into(),
        duration_s: 2.0,
        warm_up_s: 0.0,
        connections: 4,
        prompt_tokens: "16".into(),
        output_tokens: "8".into(),
        seed: 1,
        slo: Some("e2e=50ms".into()),
    }
}

/// Ten requests per second for two seconds; each takes ten milliseconds more than the one before.
pub(crate) fn report() -> Report {
    let ms = Duration::from_millis;
    let slo: Slo = "e2e=50ms".parse().unwrap();
    let mut record = Record::new(slo).unwrap();
    for number in 0..20 {
        let scheduled = ms(number * 100);
        let pieces = [1, 2, 3].map(|tokens| Piece { at: scheduled + ms(number * 2 + u64::from(tokens)), tokens });
        let mut answered =
            Answered { status: 200, tokens_in: 16, tokens_out: 6, pieces: pieces.into(), ..Answered::default() };
        if number == 19 {
            answered.fails("queue_full", "no room");
        }
        let ask = Ask { kind: Kind::Stream, prompt: 16, output: 8, number };
        record
            .count(Sample { ask, scheduled, sent: scheduled, done: scheduled + ms((number + 1) * 10), answered }, 100);
    }
    Report::new(run(), Some(10.0), record, Vec::new())
}

#[test]
fn a_report_is_read_back_as_it_was_written() {
    let report = report();
    let text = serde_json::to_string(&report).unwrap();
    let read: Report = serde_json::from_str(&text).unwrap();
    assert_eq!(read.columns(), report.columns());
    assert_eq!(read.schema, SCHEMA);
    assert_eq!(serde_json::to_string(&read).unwrap(), text);
}

#[test]
fn the_columns_say_what_the_record_says() {
    let columns: BTreeMap<String, Option<f64>> = report().columns().into_iter().collect();
    let near = |name: &str, expected: f64| {
        let found = columns[name].unwrap();
        assert!((found - expected).abs() <= expected * 0.01, "{name} is {found}, expected {expected}");
    };
    near("sent", 20.0);
    near("ok", 19.0);
    near("errors", 1.0);
    near("error_share", 0.05);
    near("tokens_in", 304.0);
    near("tokens_out", 114.0);
    near("e2e.p50", 100.0);
    near("e2e.max", 190.0);
    near("goodput_share", 0.25);
    near("sent_rate", 10.0);
    assert_eq!(columns["verification.overhead_ratio"], None);
}

#[test]
fn a_run_is_told_second_by_second() {
    let report = report();
    assert_eq!(report.seconds.iter().map(|of| of.scheduled).collect::<Vec<_>>(), [10, 10]);
    assert_eq!(report.seconds[1].failed, 1);
    assert_eq!(report.seconds.iter().map(|of| of.done).sum::<u64>(), 19);
    assert!((report.seconds[0].p50_ms.unwrap() - 50.0).abs() < 0.01);
    assert!((report.seconds[0].max_ms.unwrap() - 100.0).abs() < 0.01);
}

#[test]
fn every_file_of_a_run_is_written_and_tells_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let report = report();
    report.write(folder.path()).unwrap();
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    let csv = read("report.csv");
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!((lines.len(), lines[0].len()), (2, lines[1].len()));
    let place = lines[0].iter().position(|name| *name == "ok").unwrap();
    assert_eq!(lines[1][place], "19");
    assert_eq!(read("requests.jsonl").lines().count(), 20);
    let hgrm = read("e2e.hgrm");
    let values = hgrm.lines().skip(2).filter(|line| !line.starts_with('#'));
    let counts: Vec<u64> = values.map(|line| line.split_whitespace().nth(2).unwrap().parse().unwrap()).collect();
    assert_eq!(counts.last(), Some(&19));
    assert!(counts.windows(2).all(|pair| pair[0] <= pair[1]));
    let html = read("report.html");
    assert!(html.starts_with("<!doctype html>") && html.contains("<svg"));
    for outside in ["http://", "https://", "<link", "<script", "@import", "src="] {
        assert!(!html.replace("http://www.w3.org/2000/svg", "").contains(outside), "the page asks for {outside}");
    }
}

#[test]
fn the_table_names_every_column_that_was_measured() {
    let text = report().to_string();
    for words in ["TTFT", "ITL", "TPOT", "end to end", "send delay", "goodput", "queue_full", "tokens in, out"] {
        assert!(text.contains(words), "no {words} in\n{text}");
    }
}
