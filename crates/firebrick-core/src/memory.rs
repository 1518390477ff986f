//! The memory of this process.

/// Bytes of this process that lie in the machine's memory (its resident set); `None` where the system does not tell, which
/// only Linux does here. Memory of other devices is not in it.
pub fn resident_bytes() -> Option<u64> {
    status("VmRSS:")
}

/// The most that [`resident_bytes`] has been.
pub fn peak_resident_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// Bytes that the machine can give to processes without writing others to disk; `None` where the system does not tell. A limit on this
/// process alone, as of a container, is not in it.
pub fn available_bytes() -> Option<u64> {
    line("/proc/meminfo", "MemAvailable:")
}

fn status(name: &str) -> Option<u64> {
    line("/proc/self/status", name)
}

/// A line of one of Linux's accounts, which count in KiB.
fn line(account: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(account).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(1024 * line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_to_is_resident() {
        let Some(before) = resident_bytes() else { return };
        let block = vec![1u8; 64 << 20];
        let with = resident_bytes().unwrap();
        assert!(with > before + (48 << 20), "{before} {with} {}", block[1000]);
        assert!(peak_resident_bytes().unwrap() >= with);
        assert!(available_bytes().is_some_and(|free| free > 0));
    }
}
