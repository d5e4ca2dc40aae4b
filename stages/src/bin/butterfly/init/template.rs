//! The text of a new topology, commented for the person who will change it. Knows the keys of the seven kinds, and no file.

use std::fmt::Write;
use std::net::SocketAddr;

use butterfly_topology::NodeId;

/// What else may be said of a node.
const NODE_HINTS: &str = "\
# domain = \"lab-a\"           # who operates it; replicas of a slice go to different domains where they can
# memory = \"4 GiB\"           # what it has for weights and caches; unlimited when absent
";

/// One node of the new cluster; the first one is the gateway.
pub(super) struct Member {
    pub(super) id: NodeId,
    /// Compressed, in hex.
    pub(super) public_key: String,
    pub(super) address: SocketAddr,
    /// Where its admin listener binds.
    pub(super) admin: SocketAddr,
}

pub(super) struct Template<'a> {
    pub(super) name: &'a str,
    pub(super) model: &'a str,
    pub(super) max_byzantine: usize,
    pub(super) slices: Option<u16>,
    pub(super) members: &'a [Member],
    pub(super) http_address: &'a str,
}

impl Template<'_> {
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a string cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        self.write_cluster(text)?;
        for (index, member) in self.members.iter().enumerate() {
            write!(
                text,
                "\n[[node]]\nid = {}\nlisten_address = \"{}\"\npublic_key = \"{}\"\nadmin_address = \"{}\"\n",
                quoted(member.id.as_str()),
                member.address,
                member.public_key,
                member.admin,
            )?;
            if index == 0 {
                text.push_str(NODE_HINTS);
            }
        }
        self.write_stages(text)
    }

    fn write_cluster(&self, text: &mut String) -> std::fmt::Result {
        let slices = match self.slices {
            Some(slices) => format!("slices = {slices}                   # into how many parts the model is cut"),
            None => {
                "# slices = 2                 # into how many parts the model is cut; the planner chooses when absent"
                    .to_owned()
            }
        };
        write!(
            text,
            "#:schema ./topology.schema.json
# The whole cluster: every node runs this same file with its own id. Secrets are never in it.
# After a change: butterfly check topology.toml

[cluster]
name = {}
model = {}
max_byzantine = {}            # f: how many nodes may lie; every slice is held by 2f+1 nodes
cluster_size = {}             # checked against the nodes below
{slices}
",
            quoted(self.name),
            quoted(self.model),
            self.max_byzantine,
            self.members.len(),
        )
    }

    fn write_stages(&self, text: &mut String) -> std::fmt::Result {
        let gateway = self.members.first().map_or(String::new(), |member| quoted(member.id.as_str()));
        let verify = if self.max_byzantine == 0 { "none" } else { "full" };
        write!(
            text,
            "
# Requests enter here, on the nodes named by `on`; the others only compute and vote.
[[stage]]
kind = \"ingest\"
on = [{gateway}]
bind_address = \"{}\"
max_request_size_mb = 100
request_timeout_secs = 30     # without progress; a stream that moves is not cut
capacity = 256                # requests on their way into the log and the queue
# rate_limit_per_second = 200 # of one client
# tokens_file = \"tokens.txt\"  # SHA-256 of each API key; needed when bind_address is not of this machine alone

# Which node holds which layers.
[[stage]]
kind = \"partition\"
input = \"ingest\"
default_strategy = \"topology_aware\"
cache_size = 100

# Which request runs next, and how many at once.
[[stage]]
kind = \"assign\"
input = \"partition\"
scheduler_type = \"fifo\"         # fifo, priority (0 to 9, waiting raises it) or fair (clients in turn)
max_queue_size = 1000

# Between the nodes. The rows that compute hands on come back in here: a loop, declared as such.
[[stage]]
kind = \"transfer\"
input = [\"assign\", {{ from = \"compute.boundary\", feedback = true }}]
backend_type = \"quic\"         # quic, or local where one process plays every node

# The layers this node holds.
[[stage]]
kind = \"compute\"
input = \"transfer\"
threads = 2
micro_batch = 8

# Votes of the replicas, and what they decide.
[[stage]]
kind = \"consensus\"
input = \"compute.outcome\"
verify = \"{verify}\"               # full: all replicas compute and f+1 equal votes decide; none: only with f = 0

# The durable log, receipts, and the answer to the client.
[[stage]]
kind = \"commit\"
input = \"consensus\"
log = \"commit.redb\"           # in the node's own data folder

[telemetry]
collector_type = \"prometheus\"  # scraped at each admin_address under /metrics; or console, json: written to standard output
export_interval_secs = 60
admin_token_file = \"admin.token\" # opens the admin listeners; only its owner may read it
",
            self.http_address,
        )
    }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use butterfly::registry::catalogue;

    use super::*;
    use crate::key_file;

    #[test]
    fn the_template_passes_the_check_without_a_warning() {
        for (count, max_byzantine, slices) in [(1_u8, 0, None), (3, 1, None), (6, 1, Some(2)), (7, 3, Some(1))] {
            let members: Vec<Member> = (0..count)
                .map(|index| Member {
                    id: NodeId::parse(&format!("n{index}")).unwrap(),
                    public_key: key_file::public_hex(&key_file::generate()),
                    address: SocketAddr::from(([127, 0, 0, 1], 9000 + u16::from(index))),
                    admin: SocketAddr::from(([127, 0, 0, 1], 9100 + u16::from(index))),
                })
                .collect();
            let template = Template {
                name: "a \"name\"",
                model: "builtin:mlp",
                max_byzantine,
                slices,
                members: &members,
                http_address: "127.0.0.1:8080",
            };
            let topology = butterfly_topology::parse(&template.text(), "topology.toml", &catalogue())
                .unwrap_or_else(|diagnostics| panic!("{}", diagnostics.render(false)));
            assert!(topology.warnings.is_empty(), "{:?}", topology.warnings);
            assert_eq!(topology.cluster.nodes.len(), usize::from(count));
            assert_eq!(topology.graph.stages.len(), 7);
        }
    }
}
