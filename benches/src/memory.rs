//! The most memory a process had resident, and how often it was given some, from Linux's procfs; unknown elsewhere.

use std::fs;

/// Forgets the peak of process `pid` so far (`self` for this one); false where that cannot be done.
pub fn reset(pid: &str) -> bool {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").is_ok()
}

/// The most bytes process `pid` (`self` for this one) had resident since it began or was reset. Pages of mapped files count
/// while they are resident.
pub fn peak(pid: &str) -> Option<u64> {
    parse(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// How often process `pid` (`self` for this one) touched a page that was not mapped yet, of memory that was there: each costs the kernel
/// some 0.2 us, and clearing the page.
pub fn faults(pid: &str) -> Option<u64> {
    parse_faults(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Field 10; field 2 is a name, which may hold anything.
fn parse_faults(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(10 - 3)?.parse().ok()
}

fn parse(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_in_bytes() {
        assert_eq!(parse("Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t    1200 kB\n"), Some(1_228_800));
        assert_eq!(parse("Name:\tx\n"), None);
        assert_eq!(parse("VmHWM:\t many kB\n"), None);
        assert_eq!(peak("no-such-process"), None);
    }

    #[test]
    fn faults_are_counted() {
        assert_eq!(parse_faults("1 (a) b) S 3 4 5 6 7 8 1234 9 10 11"), Some(1234));
        assert_eq!(parse_faults("1 (a S 3 4 5 6 7 8 1234"), None);
        assert_eq!(parse_faults("1 (a) S 3 4"), None);
        if let Some(before) = faults("self") {
            // Pages of 2 MiB at most.
            let (pages, size) = (64, 1 << 21);
            drop(std::hint::black_box(vec![1u8; pages * size]));
            assert!(faults("self").unwrap() >= before + pages as u64, "new memory is touched page by page");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_reset_forgets_what_was_freed() {
        let large = 256 << 20;
        drop(std::hint::black_box(vec![1u8; large]));
        let before = peak("self").unwrap();
        assert!(before > large as u64, "{before}");
        // Some containers forbid it; then the peak stays.
        if reset("self") {
            let after = peak("self").unwrap();
            assert!(after < before - (large as u64) / 2, "{before}, then {after}");
        }
    }
}
