//! `butterfly demo`: the main job in front of one's eyes. Three nodes, one of them lying, an answer, its proof.
//!
//! Nothing is staged: the nodes are those of `serve`, joined by QUIC over the loopback, the question goes in over HTTP, and
//! the receipt is verified by the code of `butterfly verify`.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use butterfly::loopback::{Cluster, Loopback};
use butterfly_engine::telemetry::{Event, Subscriber};
use butterfly_verify::{Answer, Epoch, Receipt, Request};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

use crate::exit::{Exit, Failure};
use crate::global::{Global, Ink};

/// How long the liar may take to be caught after the answer.
const CAUGHT_MAX: Duration = Duration::from_secs(5);
/// The lies that can be shown; a node that crashes would take this process along.
const LIES: [&str; 4] = ["wrong-activations", "wrong-vote", "feed-back-other", "silent"];
/// The node that lies.
const LIAR: usize = 2;

/// See it work: three nodes in this process, one of them lying
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly demo
  butterfly demo --prompt 'A trait object' --lie wrong-vote
  butterfly demo --lie silent --json
"
)]
pub(crate) struct Args {
    /// What the model continues
    #[arg(long, default_value = "Ownership is")]
    prompt: String,
    /// Tokens to generate
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=512))]
    tokens: u32,
    /// How the third node misbehaves
    #[arg(long, default_value = LIES[0], value_parser = LIES)]
    lie: String,
    /// Where to keep the receipt [default: a folder below the system's temporary one]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::environment(format!("the runtime does not start: {error}")))?;
    runtime.block_on(show(args, global))
}

/// What `--json` prints.
#[derive(serde::Serialize)]
struct Summary {
    answer: String,
    receipt: String,
    verified: bool,
    vouched_by: Vec<String>,
    caught: Option<Caught>,
    tampering_refused: String,
    bundle: PathBuf,
    epoch: PathBuf,
}

#[derive(serde::Serialize)]
struct Caught {
    node: String,
    how: String,
}

async fn show(args: &Args, global: &Global) -> Result<(), Failure> {
    let stage = Stage { ink: global.ink_stdout(), quiet: global.json, paced: std::io::stdout().is_terminal() };
    let data = tempfile_dir("butterfly-demo-data")?;
    let cluster = start(args, &data, &stage).await?;
    let gateway = cluster.nodes.first().ok_or_else(|| Failure::new(Exit::Failure, "the demo has no node"))?;
    let mut events = gateway
        .services()
        .telemetry
        .events()
        .subscribe()
        .map_err(|error| Failure::new(Exit::Failure, error.to_string()))?;
    let address = cluster.http_address().ok_or_else(|| Failure::new(Exit::Failure, "the gateway has no address"))?;

    let streamed = ask(address, args, &stage).await?;
    let caught = catch(&mut events, &stage).await;
    let bundle = fetch(address, &format!("/inference/{}", streamed.receipt)).await?;
    let epoch = gateway.services().epoch.to_json();
    let (bundle_path, epoch_path) = keep(args, &bundle, &epoch)?;
    let proof = prove(&bundle, &epoch, &stage)?;
    stop(cluster, &data).await?;
    stage.farewell(&bundle_path, &epoch_path);
    if global.json {
        global.print_json(&Summary {
            answer: streamed.text,
            receipt: streamed.receipt,
            verified: true,
            vouched_by: proof.vouched_by,
            caught,
            tampering_refused: proof.tampering_refused,
            bundle: bundle_path,
            epoch: epoch_path,
        })?;
    }
    Ok(())
}

async fn start(args: &Args, data: &Path, stage: &Stage) -> Result<Cluster, Failure> {
    let lie = LIES.into_iter().find(|lie| *lie == args.lie).unwrap_or(LIES[0]);
    stage.title();
    let began = Instant::now();
    let loopback = Loopback { adversaries: BTreeMap::from([(LIAR, lie)]), ..Loopback::default() };
    let failed =
        |error: butterfly::node::NodeError| Failure::environment(format!("the cluster does not start: {error}"));
    let cluster = loopback.start(data).await.map_err(failed)?;
    cluster.meshed().await;
    stage.cluster(&cluster, lie, began.elapsed());
    Ok(cluster)
}

async fn stop(cluster: Cluster, data: &Path) -> Result<(), Failure> {
    cluster
        .shutdown()
        .await
        .map_err(|error| Failure::new(Exit::Failure, format!("the cluster did not stop well: {error}")))?;
    // Only the copies made for the reader are kept.
    let _ = std::fs::remove_dir_all(data);
    Ok(())
}

struct Streamed {
    text: String,
    receipt: String,
}

/// Asks over HTTP and shows the answer while it streams in.
async fn ask(address: SocketAddr, args: &Args, stage: &Stage) -> Result<Streamed, Failure> {
    let body = json!({ "model": "tiny-rust", "prompt": args.prompt, "max_tokens": args.tokens, "temperature": 0, "stream": true });
    stage.question(address, &args.prompt);
    let began = Instant::now();
    let response = send(address, "POST", "/v1/completions", body.to_string()).await?;
    let status = response.status();
    if !status.is_success() {
        let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let body = String::from_utf8_lossy(&body).into_owned();
        return Err(Failure::new(Exit::Failure, format!("the gateway answered {status}: {body}")));
    }
    let mut body = response.into_body();
    let (mut text, mut receipt, mut buffer) = (String::new(), None, Vec::new());
    let mut complete = false;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::new(Exit::Failure, format!("the stream broke off: {error}")))?;
        buffer.extend_from_slice(&frame.into_data().unwrap_or_default());
        while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            let Some(data) = event.strip_prefix(b"data: ") else { continue };
            if data.trim_ascii_end() == b"[DONE]" {
                complete = true;
                continue;
            }
            let chunk: Value = serde_json::from_slice(data)
                .map_err(|error| Failure::new(Exit::Failure, format!("the stream is not JSON: {error}")))?;
            if let Some(error) = chunk.get("error") {
                return Err(Failure::new(Exit::Failure, format!("the request failed: {error}")));
            }
            if let Some(more) = chunk["choices"][0]["text"].as_str() {
                text.push_str(more);
                stage.more(more);
            }
            receipt = chunk["butterfly"]["receipt_id"].as_str().map(str::to_owned).or(receipt);
        }
    }
    stage.answered(began.elapsed());
    match (complete, receipt) {
        (true, Some(receipt)) => Ok(Streamed { text, receipt }),
        _ => Err(Failure::new(Exit::Failure, "the stream ended without its receipt")),
    }
}

/// Waits until the gateway has named the liar, or found it silent.
async fn catch(events: &mut Subscriber, stage: &Stage) -> Option<Caught> {
    let found = async {
        loop {
            let event = events.recv().await?;
            if let Some(caught) = caught(&event) {
                return Some(caught);
            }
        }
    };
    let caught = tokio::time::timeout(CAUGHT_MAX, found).await.ok().flatten();
    stage.caught(caught.as_ref());
    caught
}

fn caught(event: &Event) -> Option<Caught> {
    let node = event.node.as_ref()?.to_string();
    match event.name {
        "accused" => {
            let how = match event.details.get("kind").map(String::as_str) {
                Some("wrong_output") => "it signed a vote for another result than f+1 nodes got from the same input",
                Some("wrong_input") => "it signed a vote over other tokens than f+1 nodes agree on",
                Some("wrong_tag") => "it did not do the work it voted on",
                Some("equivocation") => "it signed two results for one question",
                _ => "its vote contradicts f+1 others",
            };
            Some(Caught { node, how: how.into() })
        }
        "unavailable" => {
            Some(Caught { node, how: "it did not vote; that is unavailability, not proof of a lie".into() })
        }
        _ => None,
    }
}

struct Proof {
    vouched_by: Vec<String>,
    tampering_refused: String,
}

/// Verifies the bundle offline, and then a copy of it with one token changed.
fn prove(bundle: &Value, epoch: &str, stage: &Stage) -> Result<Proof, Failure> {
    let broken = |what: &str, error: &dyn std::fmt::Display| {
        Failure::new(Exit::VerificationFailed, format!("the {what} of the bundle cannot be read: {error}"))
    };
    let began = Instant::now();
    let epoch = Epoch::from_json(epoch).map_err(|error| broken("epoch", &error))?;
    let request = Request::from_json(&bundle["request"].to_string()).map_err(|error| broken("request", &error))?;
    let answer = Answer::from_json(&bundle["answer"].to_string()).map_err(|error| broken("answer", &error))?;
    let receipt = Receipt::from_json(&bundle["receipt"].to_string()).map_err(|error| broken("receipt", &error))?;
    receipt
        .verify(&epoch, Some(&request), Some(&answer))
        .map_err(|fault| Failure::new(Exit::VerificationFailed, format!("the receipt does not hold: {fault}")))?;
    let elapsed = began.elapsed();
    let votes = receipt.slices.iter().flat_map(|slice| &slice.votes);
    let vouched_by: Vec<String> =
        votes.filter_map(|vote| epoch.member(vote.signer)).map(|member| member.id.clone()).collect();
    let mut forged = answer;
    if let Answer::Text { tokens, .. } = &mut forged
        && let Some(token) = tokens.first_mut()
    {
        *token ^= 1;
    }
    let refused = match receipt.verify(&epoch, Some(&request), Some(&forged)) {
        Err(fault) => fault.to_string(),
        Ok(_) => return Err(Failure::new(Exit::VerificationFailed, "a forged answer passed")),
    };
    stage.proved(&vouched_by, elapsed, &refused);
    Ok(Proof { vouched_by, tampering_refused: refused })
}

fn keep(args: &Args, bundle: &Value, epoch: &str) -> Result<(PathBuf, PathBuf), Failure> {
    let folder = match &args.out {
        Some(folder) => {
            std::fs::create_dir_all(folder).map_err(|error| Failure::file("create", folder, &error))?;
            folder.clone()
        }
        None => tempfile_dir("butterfly-demo")?,
    };
    let (bundle_path, epoch_path) = (folder.join("bundle.json"), folder.join("epoch.json"));
    for (path, text) in [(&bundle_path, format!("{bundle:#}\n")), (&epoch_path, epoch.to_owned())] {
        std::fs::write(path, text).map_err(|error| Failure::file("write", path, &error))?;
    }
    Ok((bundle_path, epoch_path))
}

/// A fresh folder below the system's temporary one.
fn tempfile_dir(name: &str) -> Result<PathBuf, Failure> {
    let mut random = [0_u8; 6];
    getrandom::fill(&mut random).map_err(|error| Failure::environment(format!("no random numbers: {error}")))?;
    let folder = std::env::temp_dir().join(format!("{name}-{}", hex::encode(random)));
    std::fs::create_dir(&folder).map_err(|error| Failure::file("create", &folder, &error))?;
    Ok(folder)
}

async fn fetch(address: SocketAddr, path: &str) -> Result<Value, Failure> {
    let response = send(address, "GET", path, String::new()).await?;
    let status = response.status();
    let body = response
        .into_body()
        .collect()
        .await
        .map_err(|error| Failure::new(Exit::Failure, format!("{path}: {error}")))?
        .to_bytes();
    if !status.is_success() {
        return Err(Failure::new(Exit::Failure, format!("{path}: {status}: {}", String::from_utf8_lossy(&body))));
    }
    serde_json::from_slice(&body).map_err(|error| Failure::new(Exit::Failure, format!("{path}: {error}")))
}

async fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: String,
) -> Result<hyper::Response<Incoming>, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(Exit::Failure, format!("{method} {path}: {error}"));
    let stream = tokio::net::TcpStream::connect(address).await.map_err(|error| failed(&error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
    tokio::spawn(async move {
        // How the connection ended shows in the response.
        let _ = connection.await;
    });
    let request = hyper::Request::builder()
        .method(method)
        .uri(path)
        .header("host", address.to_string())
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| failed(&error))?;
    sender.send_request(request).await.map_err(|error| failed(&error))
}

/// Where the demo is shown.
struct Stage {
    ink: Ink,
    quiet: bool,
    paced: bool,
}

impl Stage {
    fn line(&self, text: &str) {
        if !self.quiet {
            println!("{text}");
        }
    }

    fn label(&self, label: &str, text: &str) {
        self.line(&format!("  {}  {text}", self.ink.faint(&format!("{label:>8}"))));
    }

    fn title(&self) {
        self.line("");
        self.line(&format!("  {}", self.ink.strong("Butterfly")));
        self.line("  One model, machines that do not trust each other, every answer proved.");
        self.line("");
    }

    fn cluster(&self, cluster: &Cluster, lie: &str, elapsed: Duration) {
        for (index, node) in cluster.nodes.iter().enumerate() {
            let services = node.services();
            let spec = services.topology.cluster.node(&services.node);
            let domain = spec.and_then(|spec| spec.domain.clone()).unwrap_or_default();
            let (mark, role) = match index {
                LIAR => (self.ink.bad("●"), self.ink.bad(&format!("lies: {lie}"))),
                0 => (self.ink.good("●"), "honest, and the gateway".into()),
                _ => (self.ink.good("●"), "honest".into()),
            };
            self.label(
                if index == 0 { "cluster" } else { "" },
                &format!("{mark} {}  {domain:<6} {role}", services.node),
            );
        }
        let text = format!("all three linked over QUIC in {} ms; any one of them may lie (f = 1)", elapsed.as_millis());
        self.label("", &self.ink.faint(&text));
        self.line("");
    }

    fn question(&self, address: SocketAddr, prompt: &str) {
        self.label(
            "ask",
            &format!("POST http://{address}/v1/completions  {}", self.ink.strong(&format!("{prompt:?}"))),
        );
        self.line("");
        if !self.quiet {
            print!("    {}", self.ink.strong(&indented(prompt)));
            self.flush();
        }
    }

    fn more(&self, text: &str) {
        if !self.quiet {
            print!("{}", indented(text));
            self.flush();
        }
    }

    fn flush(&self) {
        if self.paced {
            // A terminal that cannot be flushed shows the text a little later.
            let _ = std::io::stdout().flush();
        }
    }

    fn answered(&self, elapsed: Duration) {
        self.line("");
        self.line("");
        let text = format!("each token was released when f+1 nodes agreed on it; {} ms in all", elapsed.as_millis());
        self.label("answer", &text);
    }

    fn caught(&self, caught: Option<&Caught>) {
        match caught {
            Some(caught) => {
                self.label("caught", &format!("{} {}", self.ink.bad(&format!("✗ {}:", caught.node)), caught.how));
            }
            None => self.label("caught", "nobody, within the time this demo waits"),
        }
    }

    fn proved(&self, vouched_by: &[String], elapsed: Duration, refused: &str) {
        let names = vouched_by.join(" and ");
        let text = format!(
            "{} the receipt holds: {names} signed for this answer {}",
            self.ink.good("✓"),
            self.ink.faint(&format!("(checked offline in {:.1} ms)", elapsed.as_secs_f64() * 1000.0))
        );
        self.label("proof", &text);
        self.label("forgery", &format!("{} one token changed, and it is refused: {refused}", self.ink.good("✓")));
        self.line("");
    }

    fn farewell(&self, bundle: &Path, epoch: &Path) {
        self.line("  Check it yourself:");
        self.line(&format!("    butterfly verify {} --epoch {}", bundle.display(), epoch.display()));
        self.line("  Run your own:");
        self.line("    butterfly init && butterfly serve cluster/topology.toml");
        self.line("");
    }
}

fn indented(text: &str) -> String {
    text.replace('\n', "\n    ")
}
