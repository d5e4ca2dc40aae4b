//! `butterfly verify`: whether a receipt proves an answer, offline.
//!
//! The epoch is what the reader trusts, so it comes from the command line and never from what is to be proved. What does
//! not parse, does not fit or does not hold ends with status 5 and the name of the part. Judging is the verify crate's
//! business; here are files, and the comparison with what a client sent and received.

mod compare;
mod documents;

use std::path::PathBuf;

use butterfly_verify::{Answer, Epoch, Finish, Input, Receipt, Request, Verified};
use serde_json::{Value, json};

use crate::exit::{Exit, Failure};
use crate::global::Global;
use compare::Comparison;
use documents::{Bundle, GivenRequest, GivenResponse};

/// Characters of a prompt or an answer that are shown.
const SHOWN_CHARACTERS_MAX: usize = 60;

/// Check offline that an answer is what the nodes certified
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly verify bundle.json --epoch epoch.json
  butterfly verify bundle.json --epoch epoch.json --request sent.json --response received.json
  butterfly verify receipt.json --epoch epoch.json --request resolved.json --response answer.json

  A bundle is {\"request\": …, \"answer\": …, \"receipt\": …}, as `butterfly demo` saves it and GET /inference/{id} gives it.
",
    after_help = "Status 0: it holds. Status 5: the named part does not. Take the epoch from someone you trust: it says whose votes count."
)]
pub(crate) struct Args {
    /// A bundle, or a receipt alone
    #[arg(value_name = "RECEIPT")]
    receipt: PathBuf,
    /// The epoch: the nodes' keys, the model's digest, the plan
    #[arg(long, value_name = "FILE")]
    epoch: PathBuf,
    /// The request as you sent it (compared with the certified one), or the resolved one
    #[arg(long, value_name = "FILE")]
    request: Option<PathBuf>,
    /// The response as you received it (compared with the certified answer), or the answer itself
    #[arg(long, value_name = "FILE")]
    response: Option<PathBuf>,
    /// Accept one node's word: a request with `verify: none`, or a cluster with max_byzantine = 0
    #[arg(long)]
    one_vote: bool,
}

/// What is judged, all of it read.
struct Case {
    epoch: Epoch,
    receipt: Receipt,
    request: Option<Request>,
    answer: Option<Answer>,
    /// What a bundle shows of its answer.
    shown: Option<Value>,
    /// The client's own documents, where they are not the resolved ones.
    sent: Option<Value>,
    received: Option<Value>,
}

/// A part that does not hold, and why.
#[derive(Debug)]
pub(crate) struct Fault {
    part: String,
    reason: String,
}

impl Fault {
    fn new(part: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self { part: part.into(), reason: reason.to_string() }
    }
}

/// Why there is no verdict, or a bad one.
enum Stop {
    /// It does not hold.
    Fault(Fault),
    /// It cannot be judged.
    Failure(Failure),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    match read(args).and_then(|case| judge(args, &case).map(|verdict| (case, verdict)).map_err(Stop::from)) {
        Ok((case, (verified, comparison))) => tell_verified(&case, &verified, &comparison, global),
        Err(Stop::Failure(failure)) => Err(failure),
        Err(Stop::Fault(fault)) => {
            if global.json {
                global.print_json(&json!({ "holds": false, "part": fault.part, "reason": fault.reason }))?;
                return Err(Failure::told(Exit::VerificationFailed));
            }
            Err(Failure::new(Exit::VerificationFailed, format!("{} does not hold: {}", fault.part, fault.reason)))
        }
    }
}

fn read(args: &Args) -> Result<Case, Stop> {
    let epoch_text = documents::read(&args.epoch)?;
    let epoch = Epoch::from_json(&epoch_text).map_err(|error| Fault::new("epoch", error))?;
    let Bundle { receipt, mut request, mut answer, shown } = documents::bundle(&documents::read(&args.receipt)?)?;
    let (mut sent, mut received) = (None, None);
    if let Some(path) = &args.request {
        match documents::request(&documents::read(path)?)? {
            GivenRequest::Resolved(given) => request = Some(given),
            GivenRequest::Body(body) => sent = Some(body),
        }
    }
    if let Some(path) = &args.response {
        match documents::response(&documents::read(path)?)? {
            GivenResponse::Answer(given) => answer = Some(given),
            GivenResponse::Body(body) => received = Some(body),
        }
    }
    if sent.is_some() && request.is_none() {
        return Err(only_a_body("--request", "request").into());
    }
    if received.is_some() && answer.is_none() {
        return Err(only_a_body("--response", "answer").into());
    }
    Ok(Case { epoch, receipt, request, answer, shown, sent, received })
}

/// A client's document says less than was certified, so it can be compared but not hashed.
fn only_a_body(option: &str, part: &str) -> Failure {
    Failure::usage(format!("{option} is not the resolved {part}, and a receipt alone does not contain it"))
        .help("give the bundle from GET /inference/{id} instead of the receipt; what you sent and received is then compared with it")
}

fn judge(args: &Args, case: &Case) -> Result<(Verified, Comparison), Fault> {
    let verified = case
        .receipt
        .verify(&case.epoch, case.request.as_ref(), case.answer.as_ref())
        .map_err(|fault| split(&fault.to_string()))?;
    if !verified.is_verified() && !args.one_vote {
        return Err(Fault::new("quorum", "only one node vouches for each slice; --one-vote accepts that"));
    }
    let mut comparison = Comparison::default();
    if let (Some(sent), Some(request)) = (&case.sent, &case.request) {
        comparison.request(sent, request)?;
    }
    if let Some(answer) = &case.answer {
        for response in case.shown.iter().chain(&case.received) {
            comparison.response(response, answer, case.request.as_ref())?;
        }
    }
    Ok((verified, comparison))
}

/// The verify crate's faults read `part: part: reason`, with reasons that have no colon of their own.
fn split(fault: &str) -> Fault {
    match fault.rsplit_once(": ") {
        Some((part, reason)) => Fault::new(part, reason),
        None => Fault::new("receipt", fault),
    }
}

fn tell_verified(case: &Case, verified: &Verified, comparison: &Comparison, global: &Global) -> Result<(), Failure> {
    if global.json {
        return global.print_json(&document(case, verified, comparison));
    }
    let ink = global.ink_stdout();
    let parts = case.epoch.parts();
    let headline = match (verified.is_verified(), verified.is_complete()) {
        (true, true) => ink.good("verified"),
        (true, false) => ink.warn("the votes hold, but no answer was checked against them"),
        (false, _) => ink.warn("one node's word"),
    };
    let mut lines = vec![
        format!("{headline}: {} on {}", count(verified.votes_per_slice, "equal vote"), per_slice(verified.slices)),
        format!(
            "  epoch     {} {}, {}, at most {} of a slice may lie",
            short(&case.epoch.digest()),
            parts.cluster,
            count(parts.roster.len(), "node"),
            parts.max_byzantine,
        ),
        format!("  model     {} {}, numerics {}", short(&parts.manifest), parts.model, parts.profile),
        format!(
            "  request   {} {}",
            short(&case.receipt.rd),
            case.request.as_ref().map_or_else(not_given, describe_request)
        ),
        format!(
            "  answer    {} {}",
            short(&case.receipt.answer_root),
            case.answer.as_ref().map_or_else(not_given, describe_answer)
        ),
    ];
    for (index, certificate) in case.receipt.slices.iter().enumerate() {
        let layers = parts
            .slices
            .get(index)
            .map_or(String::new(), |slice| format!("layers {}..{}", slice.first_layer, slice.last_layer));
        let signers: Vec<String> = certificate.votes.iter().map(|vote| signer(&case.epoch, vote.signer)).collect();
        lines.push(format!("  slice {index:<3} {layers}: {}", signers.join(", ")));
    }
    if !comparison.compared.is_empty() {
        lines.push(format!("  compared  {}", comparison.compared.join(", ")));
    }
    if !comparison.skipped.is_empty() {
        lines.push(format!("  {}", ink.faint(&format!("not compared: {}", comparison.skipped.join(", ")))));
    }
    if verified.is_complete() && verified.is_verified() {
        let text = format!(
            "The answer is right unless more than {} of the nodes that hold one slice lie together.",
            parts.max_byzantine
        );
        lines.push(ink.faint(&text));
    } else if !verified.is_complete() {
        lines.push("Give the request and the answer, or a bundle with both, to prove the answer.".to_owned());
    }
    global.print(&lines.join("\n"))
}

fn document(case: &Case, verified: &Verified, comparison: &Comparison) -> Value {
    let parts = case.epoch.parts();
    let slices: Vec<Value> = case
        .receipt
        .slices
        .iter()
        .zip(&parts.slices)
        .map(|(certificate, slice)| {
            let signers: Vec<&str> = certificate
                .votes
                .iter()
                .filter_map(|vote| case.epoch.member(vote.signer))
                .map(|member| member.id.as_str())
                .collect();
            json!({ "first_layer": slice.first_layer, "last_layer": slice.last_layer, "signers": signers })
        })
        .collect();
    json!({
        "holds": true,
        "verified": verified.is_verified() && verified.is_complete(),
        "request_checked": verified.request,
        "answer_checked": verified.answer,
        "epoch": case.epoch.digest(),
        "request": case.receipt.rd,
        "answer": case.receipt.answer_root,
        "max_byzantine": verified.max_byzantine,
        "votes_per_slice": verified.votes_per_slice,
        "slices": slices,
        "compared": comparison.compared,
        "not_compared": comparison.skipped,
    })
}

fn not_given() -> String {
    "not given, known by its digest only".to_owned()
}

fn describe_request(request: &Request) -> String {
    let tokens = |tokens: &[u32]| count(tokens.len(), "token");
    match &request.input {
        Input::Text { prompt, tokens: ids } => {
            format!(
                "{} ({}), at most {}",
                quoted(prompt),
                tokens(ids),
                count(request.params.max_tokens as usize, "token")
            )
        }
        Input::Chat { messages, tokens: ids } => {
            format!(
                "{} ({}), at most {}",
                quoted(messages),
                tokens(ids),
                count(request.params.max_tokens as usize, "token")
            )
        }
        Input::Tokens { tokens: ids } => format!("{} given as such", tokens(ids)),
        Input::Vector { values } => format!("a vector of {}", values.len()),
    }
}

fn describe_answer(answer: &Answer) -> String {
    match answer {
        Answer::Text { tokens, text, finish, .. } => {
            let finish = match finish {
                Finish::Stop => "stopped",
                Finish::Length => "cut at its length",
            };
            format!("{} ({}), {finish}", quoted(&String::from_utf8_lossy(text)), count(tokens.len(), "token"))
        }
        Answer::Vector { values } => format!("a vector of {}", values.len()),
        Answer::Numeric { .. } => "none: the arithmetic left the finite numbers".to_owned(),
    }
}

/// On one line, in quotes, and not longer than a line bears; control characters are shown as escapes.
fn quoted(text: &str) -> String {
    let shown: String = text.chars().take(SHOWN_CHARACTERS_MAX).collect();
    let more = if shown.len() < text.len() { "…" } else { "" };
    format!("{shown:?}{more}")
}

fn signer(epoch: &Epoch, index: butterfly_verify::NodeIndex) -> String {
    match epoch.member(index) {
        Some(member) => match &member.domain {
            Some(domain) => format!("{} of {domain}", member.id),
            None => member.id.clone(),
        },
        None => index.to_string(),
    }
}

fn short(digest: &butterfly_verify::Digest) -> String {
    digest.to_string().chars().take(12).collect()
}

fn per_slice(slices: usize) -> String {
    if slices == 1 { "the one slice".to_owned() } else { format!("each of {slices} slices") }
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
