use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn sample(scheduled: u64, sent: u64, done: u64, pieces: &[(u64, u32)]) -> Sample {
    let pieces: Vec<Piece> = pieces.iter().map(|(at, tokens)| Piece { at: ms(*at), tokens: *tokens }).collect();
    let tokens_out = pieces.iter().map(|piece| u64::from(piece.tokens)).sum();
    Sample {
        ask: Ask { kind: Kind::Stream, prompt: 4, output: 8, number: 0 },
        scheduled: ms(scheduled),
        sent: ms(sent),
        done: ms(done),
        answered: Answered { status: 200, tokens_in: 4, tokens_out, pieces, ..Answered::default() },
    }
}

fn failed(code: &str) -> Sample {
    let mut sample = sample(0, 0, 9_000, &[]);
    sample.answered.fails(code, "no");
    sample
}

fn record(slo: &str, samples: Vec<Sample>) -> Record {
    let slo = if slo.is_empty() { Slo::default() } else { slo.parse().unwrap() };
    let mut record = Record::new(slo).unwrap();
    samples.into_iter().for_each(|sample| record.count(sample, 100));
    record
}

fn values(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    // In milliseconds, with their counts; a bucket of three digits is less than one per mille wide.
    let rounded = |value: u64| (value as f64 / 1000.0).round() as u64;
    histogram.iter_recorded().map(|step| (rounded(step.value_iterated_to()), step.count_at_value())).collect()
}

#[test]
fn latencies_count_from_the_scheduled_send() {
    let record = record("", vec![sample(100, 400, 700, &[(450, 1), (470, 1), (490, 1)])]);
    assert_eq!(values(&record.latencies.e2e), [(600, 1)]);
    assert_eq!(values(&record.latencies.ttft), [(350, 1)]);
    assert_eq!(values(&record.latencies.send_delay), [(300, 1)]);
    assert_eq!(values(&record.latencies.proof_wait), [(210, 1)]);
}

#[test]
fn tokens_that_come_together_share_their_gap() {
    let record = record("", vec![sample(0, 0, 100, &[(10, 2), (40, 3), (50, 1)])]);
    assert_eq!(values(&record.latencies.itl), [(10, 4)], "thirty milliseconds for three tokens, ten for one");
    assert_eq!(values(&record.latencies.tpot), [(10, 1)], "the first piece is no part of it");
    assert_eq!(record.tokens_out, 6);
}

#[test]
fn one_piece_has_no_gap() {
    let record = record("", vec![sample(0, 0, 100, &[(10, 5)]), sample(0, 0, 100, &[])]);
    assert!(record.latencies.itl.is_empty() && record.latencies.tpot.is_empty());
    assert_eq!((record.latencies.ttft.len(), record.latencies.e2e.len()), (1, 2));
}

#[test]
fn failures_are_counted_by_code_and_are_in_no_latency() {
    let mut record = record("", vec![failed("queue_full"), failed("queue_full"), failed("timeout")]);
    assert_eq!(record.errors, BTreeMap::from([("queue_full".into(), 2), ("timeout".into(), 1)]));
    assert_eq!((record.ok, record.sent), (0, 3));
    assert!(record.latencies.e2e.is_empty());
    assert_eq!(record.latencies.send_delay.len(), 3);
    for code in 0..100 {
        record.count(failed(&code.to_string()), 100);
    }
    assert!(record.errors.len() <= CODES_MAX + 1);
    assert_eq!(record.errors.values().sum::<u64>(), 103);
}

#[test]
fn goodput_counts_what_meets_every_objective() {
    let slow_gap = sample(0, 0, 300, &[(10, 1), (20, 1), (200, 1)]);
    let good = || sample(0, 0, 300, &[(10, 1), (20, 1), (30, 1)]);
    let late = sample(0, 500, 700, &[(510, 1), (520, 1)]);
    let all = || vec![slow_gap.clone(), good(), late.clone(), failed("timeout")];
    for (slo, met) in [
        ("ttft=200ms", 2),
        ("itl=50ms", 2),
        ("tpot=95ms", 3),
        ("tpot=94ms", 2),
        ("e2e=0.3s", 2),
        ("ttft=200ms,itl=50ms,e2e=1s", 1),
        ("e2e=5000000us", 3),
    ] {
        assert_eq!(record(slo, all()).met_slo, met, "{slo}");
    }
    assert_eq!(record("", all()).met_slo, 0, "without objectives there is no goodput");
}

#[test]
fn objectives_that_make_no_sense_are_refused() {
    for bad in ["ttft", "ttft=", "ttft=5", "ttft=-5ms", "ttft=0ms", "speed=5ms", "e2e=1s,e2e=2s", "e2e=NaNs"] {
        assert!(bad.parse::<Slo>().is_err(), "{bad}");
    }
    assert_eq!("ttft=200ms,e2e=1s".parse::<Slo>().unwrap().to_string(), "ttft=200ms,e2e=1000ms");
}

#[test]
fn workers_together_are_what_one_would_have_measured() {
    let samples: Vec<Sample> = (0..40).map(|at| sample(at * 10, at * 10, at * 13 + 5, &[(at * 10 + 3, 1)])).collect();
    let alone = record("e2e=100ms", samples.clone());
    let mut together = Record::new(alone.slo).unwrap();
    for part in samples.chunks(7) {
        together.merge(record("e2e=100ms", part.to_vec())).unwrap();
    }
    assert_eq!((together.sent, together.ok, together.met_slo), (alone.sent, alone.ok, alone.met_slo));
    assert_eq!(together.latencies.e2e, alone.latencies.e2e);
    assert_eq!(together.rows.len(), 40);
    assert!((together.done_rate() - alone.done_rate()).abs() < 1e-9);
}

#[test]
fn the_rate_of_answers_is_that_of_the_server_not_of_the_clients_patience() {
    // Ten per second, each of which takes three seconds: the rate is ten, though the run lasts longer than the load.
    let samples = (0..50).map(|at| sample(at * 100, at * 100, at * 100 + 3000, &[])).collect();
    let record = record("", samples);
    assert!((record.done_rate() - 10.0).abs() < 1e-9, "{}", record.done_rate());
    assert!((record.sent_rate() - 10.0).abs() < 1e-9);
}
