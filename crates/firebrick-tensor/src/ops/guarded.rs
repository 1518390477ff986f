//! Buffers that end where memory ends, for tests of what goes by address: one number further there is no page, and the process dies.

use std::fs::File;
use std::marker::PhantomData;

use bytemuck::Pod;
use memmap2::{MmapOptions, MmapRaw};

/// The largest page of the systems that tests run on.
const PAGE: usize = 1 << 16;

/// Values whose last byte is the last one that may be touched, and so are aligned to their own size alone.
pub(super) struct Guarded<T> {
    map: MmapRaw,
    _file: File,
    len: usize,
    values: PhantomData<T>,
}

impl<T: Pod> Guarded<T> {
    pub fn new(values: &[T]) -> Self {
        let whole = size_of_val(values).next_multiple_of(PAGE);
        let file = tempfile::tempfile().unwrap();
        file.set_len(whole as u64).unwrap();
        // A page that the file has not got cannot be touched.
        let map = MmapOptions::new().len(whole + PAGE).map_raw(&file).unwrap();
        let mut guarded = Guarded { map, _file: file, len: values.len(), values: PhantomData };
        guarded.slice_mut().copy_from_slice(values);
        guarded
    }

    fn first(&self) -> *mut T {
        self.map.as_mut_ptr().wrapping_add(self.map.len() - PAGE - self.len * size_of::<T>()).cast()
    }

    pub fn slice(&self) -> &[T] {
        // SAFETY: so many values end where the file does; any bytes are values, and nobody else has the file.
        unsafe { std::slice::from_raw_parts(self.first(), self.len) }
    }

    pub fn slice_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.first(), self.len) }
    }
}

#[test]
#[ignore = "dies: run by `what_reads_too_far_dies`"]
fn reads_too_far() {
    let guarded = Guarded::new(&[1.0f32; 100]);
    // SAFETY: none; the process is to die of it.
    std::hint::black_box(unsafe { guarded.first().add(100).read_volatile() });
}

#[test]
fn what_reads_too_far_dies() {
    use std::os::unix::process::ExitStatusExt;
    let guarded = Guarded::new(&[1.0f32; 100]);
    assert_eq!(guarded.slice().iter().sum::<f32>(), 100.0, "control: up to the end nothing happens");
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "ops::guarded::reads_too_far", "--ignored", "--test-threads=1"]);
    let died = child.output().unwrap();
    assert!(died.status.signal().is_some(), "{}: {}", died.status, String::from_utf8_lossy(&died.stdout));
}
