//! Nodes that lie, for the demo and for tests that attack a real cluster.
//!
//! Each behaviour departs from the protocol at one place that an honest build has too, so what catches it in a test
//! catches it in earnest. A build without the feature `adversary` has none of this and refuses a topology that asks for it.

use std::str::FromStr;

use butterfly_verify::{Answer, Ballot};

use crate::compute::Work;

/// How a node departs from the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Runs the model on other inputs than it claims, so all its activations are wrong.
    WrongActivations,
    /// Computes rightly and votes for something else.
    WrongVote,
    /// Samples one token and feeds another back.
    FeedBackOther,
    /// Takes requests and never says anything.
    Silent,
    /// Ends its process at the first request.
    Crash,
    /// Tells the same wrong answer as every other colluder.
    Collude,
    /// Votes for the right answer, and then for another.
    Equivocate,
}

impl Behaviour {
    /// Every behaviour with its name in topology files.
    pub const ALL: [(&'static str, Self); 7] = [
        ("wrong-activations", Self::WrongActivations),
        ("wrong-vote", Self::WrongVote),
        ("feed-back-other", Self::FeedBackOther),
        ("silent", Self::Silent),
        ("crash", Self::Crash),
        ("collude", Self::Collude),
        ("equivocate", Self::Equivocate),
    ];

    /// The token fed back in place of `token`.
    #[must_use]
    pub fn feed_back(self, token: u32) -> u32 {
        match self {
            Self::FeedBackOther => token.saturating_sub(1),
            _ => token,
        }
    }

    /// What the node does when a request reaches it.
    pub(crate) fn at_open(self) {
        if self == Self::Crash {
            std::process::abort();
        }
    }

    /// The ballots the node casts in place of `ballot`.
    pub(crate) fn ballots(self, ballot: Ballot) -> Vec<Ballot> {
        match self {
            Self::WrongVote => vec![Self::falsified(ballot)],
            Self::Equivocate => vec![ballot.clone(), Self::falsified(ballot)],
            _ => vec![ballot],
        }
    }

    fn falsified(mut ballot: Ballot) -> Ballot {
        match &mut ballot.answer {
            Some(Answer::Text { tokens, .. }) => tokens.iter_mut().for_each(|token| *token ^= 1),
            Some(Answer::Vector { values }) => values.iter_mut().for_each(|value| *value += 1.0),
            Some(Answer::Numeric { .. }) | None => {}
        }
        ballot.vote.output_root = match &ballot.answer {
            Some(answer) => answer.root(),
            None => ballot.vote.input_root,
        };
        ballot
    }

    /// The input the model really runs on, where it is not the one the vote covers.
    pub(crate) fn other_input(self, work: &Work) -> Option<Work> {
        // Colluders make the same mistake, so their votes agree with each other and with nobody else's.
        let (lower, shift) = match self {
            Self::WrongActivations => (1, 0.25),
            Self::Collude => (2, 0.5),
            _ => return None,
        };
        Some(match work {
            Work::Tokens(tokens) => Work::Tokens(tokens.iter().map(|token| token.saturating_sub(lower)).collect()),
            Work::Rows(rows) => Work::Rows(rows.iter().map(|value| value + shift).collect()),
            Work::Vector(values) => Work::Vector(values.iter().map(|value| value + shift).collect()),
        })
    }
}

/// No behaviour has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no adversary behaviour is called '{0}'; there are wrong-activations, wrong-vote, feed-back-other, silent, crash, collude and \
     equivocate"
)]
pub struct UnknownBehaviour(pub String);

impl FromStr for Behaviour {
    type Err = UnknownBehaviour;

    fn from_str(name: &str) -> Result<Self, UnknownBehaviour> {
        Self::ALL
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, behaviour)| *behaviour)
            .ok_or_else(|| UnknownBehaviour(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topology_can_name_every_behaviour_and_no_other() {
        let names = Behaviour::ALL.map(|(name, _)| name);
        assert_eq!(names.as_slice(), butterfly_topology::cluster::BEHAVIOURS);
        assert!(Behaviour::ALL.iter().all(|(name, behaviour)| name.parse() == Ok(*behaviour)));
        assert!("honest".parse::<Behaviour>().is_err());
    }
}
