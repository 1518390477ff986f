//! One part of one output while it is computed: its inputs, and the way to write it.

use super::positioned::write_at;
use super::staging::{Hasher, hex};
use super::{OutputSpec, StreamError};
use crate::block::{self, DType};
use crate::checkpoint::{Checkpoint, TensorInfo};
use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// Elements decoded at once, which keeps every buffer of an element-wise computation in the second-level cache.
pub(super) const CHUNK: usize = 8192;
/// Encoded bytes collected before they are written.
pub(super) const BUFFER: usize = 128 << 10;

/// A declared input of an output.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Position in [`Transform::sources`](super::Transform::sources).
    pub source: usize,
    /// Name, type, shape.
    pub info: &'a TensorInfo,
    /// Its stored bytes; no particular alignment.
    pub bytes: &'a [u8],
    pub(super) checkpoint: &'a Checkpoint,
}

impl<'a> Input<'a> {
    /// The bytes of the elements `range`; `None` if they are not whole blocks of the tensor.
    pub fn bytes_of(&self, range: &Range<usize>) -> Option<&'a [u8]> {
        let dtype = self.info.dtype;
        self.bytes.get(dtype.bytes_for(range.start)?..dtype.bytes_for(range.end)?)
    }

    fn block_error(&self, source: block::BlockError) -> StreamError {
        StreamError::Block { tensor: self.info.name.clone(), source }
    }

    /// The elements `range` as f32: in place where they are that already, else decoded into `buffer`.
    fn decode<'b>(&self, range: &Range<usize>, buffer: &'b mut Vec<f32>) -> Result<&'b [f32], StreamError>
    where
        'a: 'b,
    {
        let dtype = self.info.dtype;
        let bytes = self.bytes_of(range).ok_or_else(|| {
            self.block_error(block::BlockError::PartialBlock { dtype, elements: range.end })
        })?;
        if dtype == DType::F32
            && let Ok(values) = bytemuck::try_cast_slice(bytes)
        {
            return Ok(values);
        }
        buffer.resize(range.len(), 0.0);
        block::decode(dtype, bytes, buffer).map_err(|e| self.block_error(e))?;
        Ok(buffer)
    }
}

/// The part of an output that is to be computed now.
///
/// Elements are written in order with [`write_f32`](Job::write_f32) or [`write_bytes`](Job::write_bytes), in as many
/// calls as suit, or all at once by [`elementwise`](Job::elementwise) or [`copy`](Job::copy).
pub struct Job<'a> {
    pub(super) index: usize,
    pub(super) spec: &'a OutputSpec,
    pub(super) range: Range<usize>,
    pub(super) inputs: &'a [Input<'a>],
    pub(super) chunk: usize,
    pub(super) sink: Sink<'a>,
}

impl<'a> Job<'a> {
    /// Position of the output in [`Transform::outputs`](super::Transform::outputs).
    pub fn index(&self) -> usize {
        self.index
    }

    /// The output.
    pub fn spec(&self) -> &'a OutputSpec {
        self.spec
    }

    /// The elements to compute, counted row-major; all of them unless [`OutputSpec::split`] allows parts.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// The inputs in the order of [`OutputSpec::reads`].
    pub fn inputs(&self) -> &'a [Input<'a>] {
        self.inputs
    }

    /// Input `index`, in the order of [`OutputSpec::reads`].
    ///
    /// # Errors
    /// When fewer were declared.
    pub fn input(&self, index: usize) -> Result<&'a Input<'a>, StreamError> {
        let declared = self.inputs.len();
        self.inputs.get(index).ok_or(StreamError::Undeclared { index, declared })
    }

    /// All elements of input `index` as f32; borrowed where they are stored so. Counts as scratch memory.
    ///
    /// # Errors
    /// When the input was not declared or holds integers.
    pub fn read_f32(&self, index: usize) -> Result<Cow<'a, [f32]>, StreamError> {
        let input = self.input(index)?;
        // Asked before allocating.
        if !input.info.dtype.is_real() {
            return Err(input.block_error(block::BlockError::NotReal(input.info.dtype)));
        }
        if input.info.dtype == DType::F32
            && let Ok(values) = bytemuck::try_cast_slice(input.bytes)
        {
            return Ok(Cow::Borrowed(values));
        }
        let mut values = vec![0.0; input.info.elements()];
        block::decode(input.info.dtype, input.bytes, &mut values).map_err(|e| input.block_error(e))?;
        Ok(Cow::Owned(values))
    }

    /// Computes the part by one cache-sized chunk of [`range`](Job::range) after the other: `f(start, inputs, out)` gets
    /// the index of its first element and the elements of every input, and fills `out` (zeros at first), which is encoded
    /// and written at once. Chunks are whole blocks of every type involved and multiples of [`OutputSpec::split`]; what
    /// `f` computes should not depend on their length.
    ///
    /// # Errors
    /// When an input holds integers or has another number of elements than the output, or the output can't be encoded or
    /// written.
    pub fn elementwise(
        &mut self,
        mut f: impl FnMut(usize, &[&[f32]], &mut [f32]),
    ) -> Result<(), StreamError> {
        self.check_elements()?;
        let mut buffers = vec![Vec::new(); self.inputs.len()];
        let mut out = Vec::with_capacity(self.chunk.min(self.range.len()));
        for start in self.range.clone().step_by(self.chunk) {
            let chunk = start..self.range.end.min(start + self.chunk);
            out.clear();
            out.resize(chunk.len(), 0.0);
            f(start, &decode_all(self.inputs, &chunk, &mut buffers)?, &mut out);
            self.write_f32(&out)?;
        }
        Ok(())
    }

    /// Writes the elements of the first input, bit for bit if the types are equal, else converted through f32.
    ///
    /// # Errors
    /// As [`elementwise`](Job::elementwise).
    pub fn copy(&mut self) -> Result<(), StreamError> {
        let input = self.input(0)?;
        if input.info.dtype == self.spec.tensor.dtype
            && let Some(bytes) = input.bytes_of(&self.range)
        {
            self.check_elements()?;
            return self.write_bytes(bytes);
        }
        self.elementwise(|_, inputs, out| out.copy_from_slice(inputs[0]))
    }

    /// Encodes the next elements and writes them; whole blocks of the output's type.
    ///
    /// # Errors
    /// When the type holds integers, the elements are not whole blocks or more than are due, or writing fails.
    pub fn write_f32(&mut self, values: &[f32]) -> Result<(), StreamError> {
        let dtype = self.spec.tensor.dtype;
        let fail = |source| StreamError::Block { tensor: self.spec.tensor.name.clone(), source };
        let step = (BUFFER / dtype.block_bytes()).max(1) * dtype.block_len();
        for values in values.chunks(step) {
            let elements = values.len();
            let bytes = dtype
                .bytes_for(elements)
                .ok_or_else(|| fail(block::BlockError::PartialBlock { dtype, elements }))?;
            block::encode(dtype, values, self.sink.reserve(bytes)?).map_err(fail)?;
            self.sink.used += bytes;
        }
        Ok(())
    }

    /// Writes the next bytes of the output as they are.
    ///
    /// # Errors
    /// When they are more than are due, or writing fails.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.sink.write(bytes)
    }

    fn check_elements(&self) -> Result<(), StreamError> {
        let expected = block::elements(&self.spec.tensor.shape).unwrap_or(usize::MAX);
        match self.inputs.iter().map(|input| input.info).find(|info| info.elements() != expected) {
            None => Ok(()),
            Some(info) => {
                Err(StreamError::Elements { input: info.name.clone(), elements: info.elements(), expected })
            }
        }
    }
}

fn decode_all<'b>(
    inputs: &[Input<'b>],
    range: &Range<usize>,
    buffers: &'b mut [Vec<f32>],
) -> Result<Vec<&'b [f32]>, StreamError> {
    inputs.iter().zip(buffers).map(|(input, buffer)| input.decode(range, buffer)).collect()
}

/// Collects encoded bytes, hashes them and writes them to their place.
pub(super) struct Sink<'a> {
    file: &'a File,
    path: &'a Path,
    offset: u64,
    due: u64,
    written: u64,
    buffer: Vec<u8>,
    used: usize,
    hasher: Hasher,
}

impl<'a> Sink<'a> {
    pub(super) fn new(file: &'a File, path: &'a Path, offset: u64, due: u64) -> Self {
        let buffer = vec![0; due.min(BUFFER as u64) as usize];
        Sink { file, path, offset, due, written: 0, buffer, used: 0, hasher: Hasher::new() }
    }

    fn check(&self, more: usize) -> Result<(), StreamError> {
        let written = self.written + (self.used + more) as u64;
        if written > self.due { Err(StreamError::Length { written, expected: self.due }) } else { Ok(()) }
    }

    /// Room for `bytes` more, at most [`BUFFER`].
    fn reserve(&mut self, bytes: usize) -> Result<&mut [u8], StreamError> {
        self.check(bytes)?;
        if self.used + bytes > self.buffer.len() {
            self.flush()?;
        }
        Ok(&mut self.buffer[self.used..self.used + bytes])
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.check(bytes.len())?;
        if bytes.len() < self.buffer.len() {
            self.reserve(bytes.len())?.copy_from_slice(bytes);
            self.used += bytes.len();
            return Ok(());
        }
        self.flush()?;
        // Hashed and written in steps, so that the bytes are read from memory once.
        for step in bytes.chunks(BUFFER) {
            self.put(step)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), StreamError> {
        let buffer = std::mem::take(&mut self.buffer);
        let result = self.put(&buffer[..self.used]);
        (self.buffer, self.used) = (buffer, 0);
        result
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.hasher.write(bytes);
        write_at(self.file, self.offset + self.written, bytes).map_err(StreamError::io(self.path))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// The hash of all bytes, which must be as many as are due.
    pub(super) fn finish(mut self) -> Result<String, StreamError> {
        self.flush()?;
        if self.written != self.due {
            return Err(StreamError::Length { written: self.written, expected: self.due });
        }
        Ok(hex(&self.hasher))
    }
}
