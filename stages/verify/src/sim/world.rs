//! Clusters, requests and honest votes for the tests of this crate.

use std::sync::Arc;

use k256::ecdsa::SigningKey;

use crate::answer::Answer;
use crate::boundary::work_tag;
use crate::digest::Digest;
use crate::epoch::{Epoch, EpochParts, Limits, Member, NodeIndex, PublicKey, SliceReplicas};
use crate::receipt::Receipt;
use crate::request::{Input, Mode, Params, Request, RequestParts};
use crate::rules::Rules;
use crate::sign::Signer;
use crate::sim::model::{Element, Model, root_of};
use crate::tally::{Tally, TallyEvent};
use crate::vote::{Ballot, Vote};

/// A cluster: who holds what, and every node's key.
#[derive(Clone)]
pub(crate) struct World {
    /// With the rules under test.
    pub(crate) epoch: Arc<Epoch>,
    /// The same, with every rule.
    pub(crate) strict: Arc<Epoch>,
    pub(crate) signers: Vec<Signer>,
    pub(crate) model: Model,
}

/// How a cluster looks.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) max_byzantine: u16,
    pub(crate) replicas: Vec<Vec<u16>>,
    pub(crate) weights: u64,
    pub(crate) rules: Rules,
}

impl Shape {
    /// `slices` slices, each held by nodes of its own.
    pub(crate) fn disjoint(max_byzantine: u16, slices: u16) -> Self {
        let size = 2 * max_byzantine + 1;
        let replicas = (0..slices).map(|slice| (slice * size..(slice + 1) * size).collect()).collect();
        Self { max_byzantine, replicas, weights: 1, rules: Rules::ALL }
    }
}

impl World {
    pub(crate) fn new(shape: &Shape) -> Self {
        let nodes = shape.replicas.iter().flatten().max().map_or(0, |last| last + 1);
        let keys: Vec<SigningKey> = (0..nodes).map(key).collect();
        let roster = keys.iter().enumerate().map(|(node, key)| Member {
            id: format!("n{node}"),
            public_key: PublicKey(key.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap()),
            domain: (node % 2 == 0).then(|| "lab".to_owned()),
        });
        let slices = (0..).zip(&shape.replicas).map(|(slice, replicas)| SliceReplicas {
            first_layer: slice * 4,
            last_layer: slice * 4 + 4,
            replicas: replicas.iter().copied().map(NodeIndex).collect(),
        });
        let strict = Epoch::new(EpochParts {
            cluster: "sim".to_owned(),
            number: 1,
            max_byzantine: shape.max_byzantine,
            roster: roster.collect(),
            model: "miniature".to_owned(),
            manifest: Digest([shape.weights as u8; 32]),
            profile: "cpu-1".to_owned(),
            profile_digest: Digest([9; 32]),
            slices: slices.collect(),
            limits: Limits::default(),
        })
        .unwrap();
        let epoch = strict.clone().with_rules(shape.rules);
        let signers =
            keys.into_iter().zip(0..).map(|(key, node)| Signer::new(key, NodeIndex(node), &epoch).unwrap()).collect();
        let model = Model { weights: shape.weights };
        Self { epoch: Arc::new(epoch), strict: Arc::new(strict), signers, model }
    }

    pub(crate) fn slices(&self) -> usize {
        self.epoch.parts().slices.len()
    }

    pub(crate) fn last(&self) -> usize {
        self.slices() - 1
    }

    /// What every slice gets when nobody lies, the tokens first.
    pub(crate) fn honest_inputs(&self, request: &Request) -> Vec<Vec<Element>> {
        let mut fed: Vec<Element> =
            request.input.tokens().unwrap().iter().map(|token| Element::Token(*token)).collect();
        loop {
            let mut inputs = vec![fed.clone()];
            for slice in 0..self.last() {
                let rows = self.model.rows(slice, inputs.last().unwrap());
                inputs.push(rows);
            }
            let last = inputs.last().unwrap();
            if self.model.replay(self.last(), request, last).is_some() {
                return inputs;
            }
            fed.push(Element::Token(self.model.token(self.last(), &root_of(last))));
        }
    }

    /// What an honest node signs for a slice, given its input. `None` where the last slice has not come to an end.
    pub(crate) fn honest_ballot(
        &self,
        node: NodeIndex,
        slice: usize,
        request: &Request,
        input: &[Element],
    ) -> Option<Ballot> {
        let (positions, output_root, answer) = if slice == self.last() {
            let (positions, answer) = self.model.replay(slice, request, input)?;
            (positions, answer.root(), Some(answer))
        } else {
            (input.len(), root_of(&self.model.rows(slice, input)), None)
        };
        let input_root = root_of(&input[..positions]);
        let interior = self.model.interior(slice, &input_root);
        let (rd, slice, positions) = (request.digest(), slice as u16, positions as u32);
        let tag = work_tag(node, &rd, slice, positions, &interior);
        Some(Ballot { vote: Vote { rd, slice, positions, input_root, output_root, tag }, answer })
    }

    /// Every ballot of a node when nobody lies.
    pub(crate) fn honest_ballots(&self, node: NodeIndex, request: &Request) -> Vec<Ballot> {
        let inputs = self.honest_inputs(request);
        let mine = |slice: &usize| self.epoch.replicas(*slice as u16).contains(&node);
        let ballot = |slice: usize| self.honest_ballot(node, slice, request, &inputs[slice]).unwrap();
        (0..self.slices()).filter(mine).map(ballot).collect()
    }
}

impl World {
    /// The receipt and the answer of a request when nobody lies.
    pub(crate) fn decide(&self, request: &Request) -> (Receipt, Answer) {
        let mut tally = Tally::new(self.epoch.clone(), request.clone());
        for signer in &self.signers {
            let ballots = self.honest_ballots(signer.index(), request);
            for ballot in signer.seal_ballots(ballots).unwrap().ballots {
                for event in tally.handle(ballot) {
                    if let TallyEvent::Decided { receipt, answer } = event {
                        return (receipt, answer);
                    }
                }
            }
        }
        panic!("not decided")
    }
}

/// The key of a node: the same in every cluster.
pub(crate) fn key(node: u16) -> SigningKey {
    let mut bytes = [7; 32];
    bytes[..2].copy_from_slice(&node.to_be_bytes());
    SigningKey::from_slice(&bytes).unwrap()
}

/// A request with a prompt of three tokens.
pub(crate) fn request(nonce: u8, mode: Mode) -> Request {
    Request::new(RequestParts {
        client: "tester".to_owned(),
        nonce: [nonce; 32],
        model: "miniature".to_owned(),
        mode,
        input: Input::Text { prompt: format!("prompt {nonce}"), tokens: vec![1, 2, 3 + u32::from(nonce)] },
        params: Params { max_tokens: 6, ..Params::default() },
        now_ms: 1_000,
        expires_ms: 61_000,
    })
    .unwrap()
}
