//! What a node needs of any machine: a clock, a processor with the profile's instructions, UDP, room for datagrams.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use butterfly_kernels as kernels;

use super::Finding;

/// No node ran before this moment: 2025-01-01, in seconds since 1970.
const EARLIEST_UNIX_S: u64 = 1_735_689_600;
/// QUIC does not work over links with smaller packets.
const MTU_MIN: u64 = 1280;
/// Socket buffers below this lose datagrams when a node sends fast.
const SOCKET_BUFFER_BYTES: u64 = 4 << 20;
/// What a node under load opens: clients, peers, files.
const OPEN_FILES_MIN: u64 = 4096;

pub(super) fn findings() -> Vec<Finding> {
    [Some(clock()), Some(processor()), Some(udp()), mtu(), socket_buffers(), open_files()]
        .into_iter()
        .flatten()
        .collect()
}

fn clock() -> Finding {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    if now < EARLIEST_UNIX_S {
        return Finding::failure(
            "clock",
            format!("it says {now} s after 1970, which is long ago; peers would drop this gateway's requests"),
            "set it, and keep it set: timedatectl set-ntp true",
        );
    }
    Finding::ok("clock", "set; with a topology it is compared with those of nodes that run")
}

fn processor() -> Finding {
    match kernels::Path::detect() {
        Ok(path) => {
            let digest = hex::encode(kernels::profile_digest());
            let digest = digest.get(..16).unwrap_or_default();
            Finding::ok("processor", format!("{} on the {} path, {digest}", kernels::PROFILE, path.name()))
        }
        Err(error) => Finding::failure(
            "processor",
            format!("it cannot give the bits of profile {}: {error}", kernels::PROFILE),
            "run the node on another processor; results of this one would not agree with the others'",
        ),
    }
}

/// Sends one datagram to itself.
fn udp() -> Finding {
    let exchange = || {
        let (one, other) = (UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?, UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?);
        other.set_read_timeout(Some(Duration::from_secs(2)))?;
        one.send_to(&[7; 1200], other.local_addr()?)?;
        let mut buffer = [0; 2048];
        other.recv(&mut buffer)
    };
    match exchange() {
        Ok(1200) => Finding::ok("udp", "a datagram crosses the loopback"),
        Ok(bytes) => Finding::failure("udp", format!("of 1200 bytes {bytes} came over the loopback"), FIREWALL),
        Err(error) => Finding::failure("udp", format!("no datagram crosses the loopback: {error}"), FIREWALL),
    }
}

const FIREWALL: &str = "nodes talk over UDP: let the firewall or the sandbox of this process allow it";

fn mtu() -> Option<Finding> {
    let links = fs::read_dir("/sys/class/net").ok()?;
    let number = |path: std::path::PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let mut links: Vec<(String, u64)> = links
        .flatten()
        .filter(|link| {
            let state = fs::read_to_string(link.path().join("operstate")).unwrap_or_default();
            matches!(state.trim(), "up" | "unknown")
        })
        .filter_map(|link| Some((link.file_name().into_string().ok()?, number(link.path().join("mtu"))?)))
        .collect();
    links.sort();
    let shown: Vec<String> = links.iter().map(|(name, mtu)| format!("{name} {mtu}")).collect();
    let small = links.iter().find(|(_, mtu)| *mtu < MTU_MIN);
    Some(match small {
        Some((name, mtu)) => Finding::failure(
            "mtu",
            format!("{name} carries packets of {mtu} bytes, and QUIC needs {MTU_MIN}"),
            format!("ip link set dev {name} mtu 1500, or reach the peers by another link"),
        ),
        None => Finding::ok("mtu", format!("bytes of a packet: {}", shown.join(", "))),
    })
}

fn socket_buffers() -> Option<Finding> {
    let bytes: u64 = fs::read_to_string("/proc/sys/net/core/rmem_max").ok()?.trim().parse().ok()?;
    Some(if bytes < SOCKET_BUFFER_BYTES {
        Finding::warning(
            "socket buffers",
            format!("at most {bytes} bytes; datagrams get lost, and are sent again, when a peer sends fast"),
            format!("sysctl -w net.core.rmem_max={SOCKET_BUFFER_BYTES} net.core.wmem_max={SOCKET_BUFFER_BYTES}"),
        )
    } else {
        Finding::ok("socket buffers", format!("up to {bytes} bytes"))
    })
}

fn open_files() -> Option<Finding> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let soft = line.split_whitespace().next()?;
    let is_low = soft.parse::<u64>().is_ok_and(|soft| soft < OPEN_FILES_MIN);
    Some(if is_low {
        Finding::warning(
            "open files",
            format!("at most {soft}; a gateway runs out of them under load"),
            format!("ulimit -n {OPEN_FILES_MIN}, or LimitNOFILE={OPEN_FILES_MIN} in its systemd unit"),
        )
    } else {
        Finding::ok("open files", format!("up to {soft}"))
    })
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn this_machine_is_looked_at_and_every_problem_has_its_fix() {
        let findings = findings();
        assert!(findings.len() >= 3);
        for finding in findings {
            assert_eq!(finding.fix.is_none(), finding.state == State::Ok, "{finding:?}");
        }
    }
}
