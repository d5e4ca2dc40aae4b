//! This program and llama.cpp in turn, on the same GGUF file, with the same threads, in one run.
//!
//! Purpose: ratios. A machine's speed drifts between two runs; two engines that are measured alternately see the same
//! drift. llama.cpp runs in a process of its own, through the low-level interface of llama-cpp-python, and is asked for
//! one measurement at a time.
//!
//! Invariants: both get the same token ids and count the same work: a prompt in one batch, answers one token at a time.
//! Likelihoods are taken over the same ids, with keys and values in f16 on both sides.

use std::fmt::{self, Display, Formatter};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::Context;
use butterfly::model::StepOutput;
use butterfly_kernels::Pool;
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use crate::kernels::{BEFORE, Loaded, Shape, median};
use crate::synth::absolute;

const SCRIPT: &str = include_str!("peer/llama_cpp.py");

#[derive(Args)]
pub(crate) struct PeerArgs {
    /// The GGUF file.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    shape: Shape,
    /// A Python that has llama-cpp-python; without it one is made in --venv.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Where a virtual environment with llama-cpp-python is, or is made.
    #[arg(long, default_value = ".butterfly/peer")]
    venv: PathBuf,
    /// Compare the perplexity of this text instead of speed, on the last of --threads.
    #[arg(long)]
    perplexity: Option<PathBuf>,
    /// Tokens of each window of the text.
    #[arg(long, default_value_t = 512)]
    window: usize,
}

/// Both engines' figures.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Comparison {
    Speed { model: String, llama_cpp: String, rows: Vec<Row> },
    Perplexity { model: String, llama_cpp: String, tokens: usize, ours: f64, theirs: f64, same_ids: bool },
}

/// Medians of one measurement, in tokens per second.
#[derive(Serialize)]
pub(crate) struct Row {
    what: &'static str,
    threads: usize,
    ours: f64,
    theirs: f64,
    /// Median of the ratios of the rounds.
    ratio: f64,
}

/// Runs both.
pub(crate) fn run(args: &PeerArgs) -> anyhow::Result<Comparison> {
    let python = args.python.clone().map_or_else(|| environment(&args.venv), Ok)?;
    let loaded = Loaded::open(&args.model, false)?;
    let shape = &args.shape;
    // Whole pages of 256 positions, as llama.cpp deals them.
    let context = shape.prompt.max(args.window).max(BEFORE + shape.tokens).next_multiple_of(256);
    let batch = shape.prompt.max(args.window).max(BEFORE * shape.sequences);
    let mut peer = Peer::start(&python, &args.model, [context, batch])?;
    let model = loaded.model.manifest().name.clone();
    match &args.perplexity {
        Some(text) => perplexity(args, text, &loaded, &mut peer, model),
        None => {
            let rows = speed(shape, &loaded, &mut peer)?;
            Ok(Comparison::Speed { model, llama_cpp: peer.version.clone(), rows })
        }
    }
}

fn speed(shape: &Shape, loaded: &Loaded, peer: &mut Peer) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for &threads in &shape.threads {
        let pool = Pool::new(threads, loaded.path);
        let (prompt, tokens, sequences) = (shape.prompt, shape.tokens, shape.sequences);
        for (what, sequences) in [("prefill", 0), ("decode", 1), ("batched decode", sequences)] {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for _ in 0..shape.rounds.max(1) {
                ours.push(match sequences {
                    0 => loaded.prefill(&pool, prompt)?,
                    _ => loaded.decode(&pool, sequences, tokens)?,
                });
                theirs.push(match sequences {
                    0 => peer.number(&json!({ "what": "prefill", "threads": threads, "tokens": prompt }))?,
                    _ => {
                        let ask =
                            json!({ "what": "decode", "threads": threads, "sequences": sequences, "tokens": tokens });
                        peer.number(&ask)?
                    }
                });
            }
            let ratios = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
            rows.push(Row { what, threads, ours: median(ours), theirs: median(theirs), ratio: median(ratios) });
        }
    }
    Ok(rows)
}

fn perplexity(
    args: &PeerArgs,
    text: &Path,
    loaded: &Loaded,
    peer: &mut Peer,
    model: String,
) -> anyhow::Result<Comparison> {
    let text = std::fs::read_to_string(text).with_context(|| format!("reading {}", text.display()))?;
    let threads = args.shape.threads.last().copied().unwrap_or(1);
    let pool = Pool::new(threads, loaded.path);
    let ids = loaded.model.tokenizer().context("the model has no tokenizer")?.encode(&text)?;
    let same_ids = peer.ask(&json!({ "what": "encode", "text": text }))? == json!(ids);
    let (mut ours, mut theirs, mut tokens) = (0.0, 0.0, 0);
    for window in ids.chunks(args.window).filter(|window| window.len() > 1) {
        ours += likelihood(loaded, &pool, window)?;
        theirs += peer.number(&json!({ "what": "likelihood", "threads": threads, "ids": window }))?;
        tokens += window.len() - 1;
    }
    let perplexity = |likelihood: f64| (-likelihood / tokens as f64).exp();
    let llama_cpp = peer.version.clone();
    Ok(Comparison::Perplexity {
        model,
        llama_cpp,
        tokens,
        ours: perplexity(ours),
        theirs: perplexity(theirs),
        same_ids,
    })
}

/// Sum of the natural logarithms of the probabilities of all tokens but the first.
fn likelihood(loaded: &Loaded, pool: &Pool, tokens: &[u32]) -> anyhow::Result<f64> {
    let mut sequence = [loaded.slice.new_sequence()];
    let mut total = 0.0;
    for pair in tokens.windows(2) {
        let &[token, following] = pair else { continue };
        let Some(StepOutput::Logits(logits)) = loaded.pass(pool, &mut sequence, &[token])?.pop() else {
            anyhow::bail!("the model's arithmetic left the finite numbers");
        };
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
        let logit = logits.get(following as usize).copied().context("a token outside the vocabulary")?;
        total += f64::from(logit - most) - sum.ln();
    }
    Ok(total)
}

/// A virtual environment with llama-cpp-python; made if it is not there, which compiles for minutes.
fn environment(folder: &Path) -> anyhow::Result<PathBuf> {
    let python = folder.join("bin/python");
    let has_it = |python: &Path| {
        let mut command = Command::new(python);
        let command = command.args(["-c", "import llama_cpp"]).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if has_it(&python) {
        return Ok(python);
    }
    let run = |program: &Path, args: &[&str]| -> anyhow::Result<()> {
        let status =
            Command::new(program).args(args).status().with_context(|| format!("starting {}", program.display()))?;
        anyhow::ensure!(status.success(), "{} {} failed", program.display(), args.join(" "));
        Ok(())
    };
    eprintln!("installing llama-cpp-python from PyPI in {}", folder.display());
    run(Path::new("python3"), &["-m", "venv", &folder.to_string_lossy()])?;
    run(&python, &["-m", "pip", "install", "--quiet", "llama-cpp-python"])?;
    anyhow::ensure!(has_it(&python), "llama-cpp-python was installed and cannot be imported");
    Ok(python)
}

/// llama.cpp in a process of its own; ended when this is dropped.
struct Peer {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    version: String,
}

impl Peer {
    fn start(python: &Path, model: &Path, sizes: [usize; 2]) -> anyhow::Result<Self> {
        let mut command = Command::new(python);
        command.args(["-c", SCRIPT, &absolute(model)?]).args(sizes.map(|size| size.to_string()));
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("starting Python")?;
        let (input, output) = process.stdin.take().zip(process.stdout.take()).context("Python has no pipes")?;
        let mut peer = Self { process, input, output: BufReader::new(output), version: String::new() };
        let version = peer.read()?;
        peer.version = version.get("version").and_then(Value::as_str).unwrap_or("unknown").to_owned();
        Ok(peer)
    }

    fn ask(&mut self, question: &Value) -> anyhow::Result<Value> {
        writeln!(self.input, "{question}").context("llama.cpp ended")?;
        self.input.flush()?;
        Ok(self.read()?.get_mut("answer").map(Value::take).unwrap_or_default())
    }

    fn number(&mut self, question: &Value) -> anyhow::Result<f64> {
        self.ask(question)?.as_f64().context("llama.cpp gave no number")
    }

    fn read(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).context("llama.cpp ended; its errors are above")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It waits for input, so there is nothing to lose.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Display for Comparison {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Speed { model, llama_cpp, rows } => {
                writeln!(f, "{model}, against llama-cpp-python {llama_cpp}; tokens per second")?;
                writeln!(f, "{:<15} {:>7} {:>10} {:>10} {:>7}", "", "threads", "butterfly", "llama.cpp", "ratio")?;
                for Row { what, threads, ours, theirs, ratio } in rows {
                    writeln!(f, "{what:<15} {threads:>7} {ours:>10.2} {theirs:>10.2} {ratio:>6.2}x")?;
                }
                Ok(())
            }
            Self::Perplexity { model, llama_cpp, tokens, ours, theirs, same_ids } => {
                let difference = 100.0 * (ours / theirs - 1.0);
                writeln!(
                    f,
                    "{model}: perplexity {ours:.4}, llama-cpp-python {llama_cpp} {theirs:.4} ({difference:+.3} %)"
                )?;
                writeln!(
                    f,
                    "{tokens} tokens; both tokenise the text {}",
                    if *same_ids { "alike" } else { "differently" }
                )
            }
        }
    }
}
