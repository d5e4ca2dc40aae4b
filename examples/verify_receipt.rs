//! Verifies a saved answer offline, with nothing but the verify crate: no model, no tokenizer, no network.
//!
//! `cargo run --example verify_receipt -- bundle.json epoch.json`
//!
//! `butterfly demo` prints the paths of such a pair; `GET /inference/{task_id}` gives the bundle of any task. The epoch must
//! come from someone you trust.

use butterfly_verify::{Answer, Epoch, Receipt, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(bundle), Some(epoch)) = (arguments.next(), arguments.next()) else {
        return Err("usage: verify_receipt BUNDLE EPOCH".into());
    };
    let bundle: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(bundle)?)?;
    let epoch = Epoch::from_json(&std::fs::read_to_string(epoch)?)?;
    let request = Request::from_json(&bundle["request"].to_string())?;
    let answer = Answer::from_json(&bundle["answer"].to_string())?;
    let receipt = Receipt::from_json(&bundle["receipt"].to_string())?;

    let verified = receipt.verify(&epoch, Some(&request), Some(&answer))?;
    println!("the receipt holds; verified: {}", verified.is_verified());
    for (slice, certificate) in receipt.slices.iter().enumerate() {
        let signers = certificate.votes.iter().filter_map(|vote| epoch.member(vote.signer));
        let names: Vec<&str> = signers.map(|member| member.id.as_str()).collect();
        println!("slice {slice}: {}", names.join(", "));
    }
    Ok(())
}
