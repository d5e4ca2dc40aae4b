//! Reads a topology for a command: file, then environment, then `--set`, then the check. Every command that takes a
//! topology takes it from here, so that all agree on what it says.

use std::io::Read;
use std::path::Path;

use butterfly::registry::catalogue;
use butterfly_topology::{Diagnostics, Topology};

use crate::exit::{Exit, Failure};
use crate::global::Global;
use crate::settings::{self, Setting};

/// The largest topology file.
pub(crate) const TOPOLOGY_BYTES_MAX: u64 = 4 << 20;

/// Reads and checks; what is wrong is shown, and ends the command with status 3.
pub(crate) fn load(path: &Path, global: &Global) -> Result<Topology, Failure> {
    let topology = check(path, global)?.map_err(|diagnostics| {
        global.say(diagnostics.render(global.ink_stderr().on).trim_end());
        Failure::told(Exit::InvalidTopology)
    })?;
    tell_warnings(&topology, global);
    Ok(topology)
}

/// Reads and checks; the outer error is a file that cannot be read or a setting that fits nothing.
pub(crate) fn check(path: &Path, global: &Global) -> Result<Result<Topology, Diagnostics>, Failure> {
    let text = read(path)?;
    let mut settings = Setting::from_environment(environment())?;
    settings.extend(global.set.iter().cloned());
    let text = settings::apply(&text, &settings)?;
    Ok(butterfly_topology::parse(&text, &path.display().to_string(), &catalogue()))
}

/// Warnings are for people, and end nothing.
pub(crate) fn tell_warnings(topology: &Topology, global: &Global) {
    if !topology.warnings.is_empty() {
        global.say(topology.warnings.render(global.ink_stderr().on).trim_end());
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    let unreadable = |error: std::io::Error| Failure::file("read", path, &error);
    let file = std::fs::File::open(path)
        .map_err(|error| unreadable(error).help("`butterfly init` writes a topology to start from"))?;
    let mut bytes = Vec::new();
    file.take(TOPOLOGY_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > TOPOLOGY_BYTES_MAX {
        return Err(Failure::new(
            Exit::InvalidTopology,
            format!("{} is larger than the {} MiB of a topology", path.display(), TOPOLOGY_BYTES_MAX >> 20),
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let line =
            1 + error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        Failure::new(Exit::InvalidTopology, format!("{}:{line}: the text is not UTF-8", path.display()))
    })
}

/// Variables whose name or value is no text set nothing.
fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}
