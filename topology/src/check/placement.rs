//! Placement: which stages run on which nodes.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalogue::Catalogue;
use crate::diagnostic::{Code, Diagnostic, quote};
use crate::graph::Graph;
use crate::name::{NodeId, StageName};
use crate::schema::{Span, StageDecl, list};
use crate::suggest;

use super::cluster::Crew;

/// Ids shown of a long list.
const IDS_SHOWN_MAX: usize = 4;

/// Whether every `on` names nodes of the cluster, each once.
pub(super) fn check_names(stages: &[StageDecl<'_>], crew: &Crew, problems: &mut Vec<Diagnostic>) -> bool {
    let known: BTreeSet<&NodeId> = crew.ids.iter().collect();
    let mut all_known = true;
    for stage in stages {
        let mut first: BTreeMap<&NodeId, &Span> = BTreeMap::new();
        for (id, span) in stage.on.iter().flatten() {
            let earlier = *first.entry(id).or_insert(span);
            if earlier != span {
                problems.push(
                    Diagnostic::error(Code::Duplicate, format!("`on` names node `{id}` twice"))
                        .at(span.clone(), "again")
                        .also(earlier.clone(), "first named here"),
                );
            }
            // A node whose id could not be read may be the one that is meant.
            if known.contains(id) || !crew.complete && suggest::nearest(id.as_str(), ids(crew)).is_none() {
                continue;
            }
            all_known = false;
            let diagnostic = Diagnostic::error(Code::UnknownNode, format!("there is no node `{id}`"));
            problems.push(match suggest::nearest(id.as_str(), ids(crew)) {
                Some(near) => diagnostic.at(span.clone(), format!("did you mean {}?", quote(near))),
                None => diagnostic.at(span.clone(), "no such node").help(format!("the nodes are {}", some(&crew.ids))),
            });
        }
    }
    all_known
}

fn ids(crew: &Crew) -> impl Iterator<Item = &str> {
    crew.ids.iter().map(NodeId::as_str)
}

fn some(ids: &[NodeId]) -> String {
    if ids.len() <= IDS_SHOWN_MAX {
        return list(ids);
    }
    let shown: Vec<String> = ids.iter().take(IDS_SHOWN_MAX).map(|id| quote(id.as_str())).collect();
    format!("{} and {} more", shown.join(", "), ids.len() - IDS_SHOWN_MAX)
}

/// Reports stages that run nowhere, and edges whose items would arrive where nobody takes them.
pub(super) fn check_running(
    graph: &Graph,
    ids: &[NodeId],
    stages: &[StageDecl<'_>],
    catalogue: &Catalogue,
    problems: &mut Vec<Diagnostic>,
) {
    let running: Vec<(&NodeId, BTreeSet<StageName>)> =
        ids.iter().map(|id| (id, graph.running_on(id, catalogue))).collect();
    let decl = |name: &StageName| stages.iter().find(|stage| stage.name.as_ref() == Some(name));
    let on_span = |stage: &StageDecl<'_>| match stage.on.as_deref() {
        Some([(_, first), .., (_, last)]) => first.start..last.end,
        Some([(_, only)]) => only.clone(),
        _ => stage.name_span.clone(),
    };
    let mut nowhere = BTreeSet::new();
    for stage in &graph.stages {
        if running.iter().any(|(_, running)| running.contains(&stage.name)) {
            continue;
        }
        nowhere.insert(&stage.name);
        let fed_by: Vec<&StageName> =
            graph.inputs(&stage.name).filter(|edge| !edge.feedback).map(|edge| &edge.from.stage).collect();
        // Only the first of a row of stages is reported: the ones behind it follow from it.
        if fed_by.iter().any(|feeder| nowhere.contains(feeder)) {
            continue;
        }
        let Some(decl) = decl(&stage.name) else { continue };
        problems.push(
            Diagnostic::error(Code::NeverRuns, format!("stage `{}` runs on no node", stage.name))
                .at(on_span(decl), format!("{} does not run there", list(&fed_by)))
                .help("an edge stays on its node: run the stage where its input runs"),
        );
    }
    for edge in &graph.edges {
        if nowhere.contains(&edge.to.stage) {
            continue;
        }
        let cut: Vec<NodeId> = running
            .iter()
            .filter(|(_, running)| running.contains(&edge.from.stage) && !running.contains(&edge.to.stage))
            .map(|(id, _)| (*id).clone())
            .collect();
        let Some(decl) = decl(&edge.to.stage).filter(|_| !cut.is_empty()) else { continue };
        let message =
            format!("stage `{}` does not run on {}, where `{}` feeds it", edge.to.stage, some(&cut), edge.from.stage);
        problems.push(
            Diagnostic::error(Code::CutEdge, message)
                .at(on_span(decl), format!("the `{}` of `{}` would be lost there", edge.item, edge.from))
                .help("an edge stays on its node: run both stages on the same nodes"),
        );
    }
}
