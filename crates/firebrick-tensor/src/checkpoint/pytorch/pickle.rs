//! The pickle in a PyTorch checkpoint: a stack machine, of which this runs the part that builds dictionaries of tensors.
//!
//! Every object is made once and then passed by number, and what is copied (dimensions, names of classes) is short: memory is bounded by
//! the length of the program whatever it does. Instructions: <https://github.com/python/cpython/blob/main/Lib/pickletools.py>.

use super::super::error::{CheckpointError, Result};
use super::storage_dtype;
use crate::block::DType;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Most dimensions of a tensor, as in torch.
const MAX_DIMS: usize = 64;
/// Longest name of a module, a class or a storage.
const MAX_CLASS: usize = 256;

/// A value that the program made.
#[derive(Debug)]
pub(super) enum Object {
    Int(i64),
    Text(String),
    Tuple(Vec<usize>),
    /// Keys and values in the order they were set.
    Dict(Vec<(usize, usize)>),
    /// A class or function: module and name.
    Class(String),
    Storage(Storage),
    Tensor(Tensor),
    /// Anything that tensors are not made of.
    Other,
}

/// Bytes of an entry of the archive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage {
    pub(super) dtype: DType,
    /// The number of the text that names it.
    key: usize,
}

/// A view of a storage.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub(super) storage: Storage,
    /// In elements.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// What a program left behind.
pub(super) struct Pickle {
    objects: Vec<Object>,
    root: usize,
}

impl Pickle {
    /// The object with this number.
    pub(super) fn get(&self, id: usize) -> &Object {
        &self.objects[id]
    }

    /// What was pickled.
    pub(super) fn root(&self) -> &Object {
        &self.objects[self.root]
    }

    /// The name of a storage.
    pub(super) fn key(&self, storage: Storage) -> &str {
        match &self.objects[storage.key] {
            Object::Text(key) => key,
            _ => "",
        }
    }

    /// Runs the program in `bytes[program]`.
    pub(super) fn run(path: &Path, bytes: &[u8], program: Range<usize>) -> Result<Self> {
        let end = program.end;
        let mut machine = Machine {
            path,
            bytes: &bytes[..end],
            at: program.start,
            started: program.start,
            objects: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        loop {
            if let Some(root) = machine.step()? {
                return Ok(Pickle { objects: machine.objects, root });
            }
        }
    }
}

struct Machine<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    /// Where the instruction starts that is running.
    started: usize,
    objects: Vec<Object>,
    stack: Vec<usize>,
    /// Heights of the stack at each mark.
    marks: Vec<usize>,
    memo: HashMap<u64, usize>,
}

impl<'a> Machine<'a> {
    /// Runs one instruction; at the last one gives what was pickled.
    fn step(&mut self) -> Result<Option<usize>> {
        self.started = self.at;
        match self.byte()? {
            // PROTO, FRAME: how the rest is written.
            0x80 => drop(self.byte()?),
            0x95 => drop(self.take(8)?),
            b'.' => return self.pop().map(Some),
            // NONE, NEWTRUE, NEWFALSE.
            b'N' | 0x88 | 0x89 => self.push(Object::Other),
            b'K' => self.int(1)?,
            b'M' => self.int(2)?,
            b'J' => {
                let value = i32::from_le_bytes(*self.take(4)?.first_chunk().expect("4 bytes were taken"));
                self.push(Object::Int(value.into()));
            }
            // LONG1: a length, and that many bytes.
            0x8a => {
                let len = self.number(1)? as usize;
                let value = self.take(len)?;
                let negative = value.last().is_some_and(|b| b & 0x80 != 0);
                let fits = value.len() <= 8 && !negative;
                let value = value.iter().rev().take(8).fold(0i64, |n, b| n << 8 | i64::from(*b));
                self.push(if fits { Object::Int(value) } else { Object::Other });
            }
            b'G' => {
                self.take(8)?;
                self.push(Object::Other);
            }
            // BINUNICODE, SHORT_BINUNICODE and the strings of Python 2, BINSTRING and SHORT_BINSTRING.
            b'X' | b'T' => self.text(4)?,
            0x8c | b'U' => self.text(1)?,
            // BINBYTES, SHORT_BINBYTES.
            b'B' => self.skip_text(4)?,
            b'C' => self.skip_text(1)?,
            b'(' => self.marks.push(self.stack.len()),
            b')' => self.push(Object::Tuple(Vec::new())),
            b't' => {
                let items = self.since_mark()?;
                self.push(Object::Tuple(items));
            }
            count @ 0x85..=0x87 => {
                let start = self.floor(usize::from(count - 0x84))?;
                let items = self.stack.split_off(start);
                self.push(Object::Tuple(items));
            }
            b'}' => self.push(Object::Dict(Vec::new())),
            b']' => self.push(Object::Other),
            // APPEND, APPENDS: no list holds what is looked for.
            b'a' => drop(self.pop()?),
            b'e' => drop(self.since_mark()?),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(&[key, value])?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.set(&items)?;
            }
            // BUILD: attributes of an object, of which a dictionary of tensors needs none.
            b'b' => drop(self.pop()?),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Object::Class(format!("{module}.{name}")));
            }
            // STACK_GLOBAL.
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.objects[module], &self.objects[name]) {
                    (Object::Text(module), Object::Text(name))
                        if module.len().max(name.len()) <= MAX_CLASS =>
                    {
                        let class = Object::Class(format!("{module}.{name}"));
                        self.push(class);
                    }
                    _ => return Err(self.error("a class without a name")),
                }
            }
            b'q' => self.memoize(1)?,
            b'r' => self.memoize(4)?,
            // MEMOIZE.
            0x94 => {
                let top = self.top()?;
                self.memo.insert(self.memo.len() as u64, top);
            }
            b'h' => self.recall(1)?,
            b'j' => self.recall(4)?,
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id);
                self.push(storage);
            }
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let made = self.call(function, arguments)?;
                self.push(made);
            }
            // NEWOBJ: an object of a class that is not known here.
            0x81 => {
                self.pop()?;
                self.pop()?;
                self.push(Object::Other);
            }
            other => {
                return Err(
                    self.error(format!("instruction {other:#04x} does not occur in a dictionary of tensors"))
                );
            }
        }
        Ok(None)
    }

    /// A function of torch's that makes tensors, or a constructor.
    fn call(&self, function: usize, arguments: usize) -> Result<Object> {
        let (Object::Class(class), Object::Tuple(arguments)) =
            (&self.objects[function], &self.objects[arguments])
        else {
            return Ok(Object::Other);
        };
        match class.as_str() {
            "collections.OrderedDict" if arguments.is_empty() => Ok(Object::Dict(Vec::new())),
            "torch._utils._rebuild_tensor_v2" => match self.tensor(arguments) {
                Some(tensor) => Ok(Object::Tensor(tensor)),
                None => Err(self.error("a tensor whose storage, offset, size or stride is none")),
            },
            "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" => {
                match arguments.first().map(|id| &self.objects[*id]) {
                    Some(Object::Tensor(tensor)) => Ok(Object::Tensor(tensor.clone())),
                    _ => Err(self.error("a parameter that is no tensor")),
                }
            }
            // Tensors of other kinds must not go missing without a word.
            other if other.contains("._rebuild") => {
                Err(self.error(format!("`{other}` makes tensors of a kind that is not supported")))
            }
            _ => Ok(Object::Other),
        }
    }

    /// `(storage, offset, size, stride, ...)`.
    fn tensor(&self, arguments: &[usize]) -> Option<Tensor> {
        let [storage, offset, size, stride, ..] = arguments else { return None };
        let Object::Storage(storage) = &self.objects[*storage] else { return None };
        let int = |id: usize| match &self.objects[id] {
            Object::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        };
        let ints = |id: usize| match &self.objects[id] {
            Object::Tuple(items) => items.iter().map(|id| int(*id)).collect::<Option<Vec<usize>>>(),
            _ => None,
        };
        let short = |id: usize| matches!(&self.objects[id], Object::Tuple(items) if items.len() <= MAX_DIMS);
        if !short(*size) || !short(*stride) {
            return None;
        }
        let (shape, strides) = (ints(*size)?, ints(*stride)?);
        let tensor = Tensor { storage: *storage, offset: int(*offset)?, shape, strides };
        (tensor.shape.len() == tensor.strides.len()).then_some(tensor)
    }

    /// `('storage', class, key, device, elements)`.
    fn storage(&self, id: usize) -> Object {
        let Object::Tuple(items) = &self.objects[id] else { return Object::Other };
        let [_, class, key, ..] = items[..] else { return Object::Other };
        match (&self.objects[class], &self.objects[key]) {
            // Short, because every tensor of the storage may name it in an error.
            (Object::Class(class), Object::Text(name)) if name.len() <= MAX_CLASS => {
                match class.strip_prefix("torch.").and_then(storage_dtype) {
                    Some(dtype) => Object::Storage(Storage { dtype, key }),
                    None => Object::Other,
                }
            }
            _ => Object::Other,
        }
    }

    /// Sets keys and values, one after the other, in the dictionary on top of the stack.
    fn set(&mut self, items: &[usize]) -> Result<()> {
        let top = self.top()?;
        if !items.len().is_multiple_of(2) {
            return Err(self.error("a key without a value"));
        }
        match &mut self.objects[top] {
            Object::Dict(entries) => entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            Object::Other => {}
            _ => return Err(self.error("values for what is no dictionary")),
        }
        Ok(())
    }

    fn int(&mut self, len: usize) -> Result<()> {
        let value = self.number(len)? as i64;
        self.push(Object::Int(value));
        Ok(())
    }

    fn text(&mut self, len: usize) -> Result<()> {
        let len = self.number(len)? as usize;
        let text = std::str::from_utf8(self.take(len)?).map(str::to_owned);
        let text = text.map_err(|_| self.error("a text that is not UTF-8"))?;
        self.push(Object::Text(text));
        Ok(())
    }

    fn skip_text(&mut self, len: usize) -> Result<()> {
        let len = self.number(len)? as usize;
        self.take(len)?;
        self.push(Object::Other);
        Ok(())
    }

    fn memoize(&mut self, len: usize) -> Result<()> {
        let (key, top) = (self.number(len)?, self.top()?);
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, len: usize) -> Result<()> {
        let key = self.number(len)?;
        let id = *self.memo.get(&key).ok_or_else(|| self.error(format!("nothing was kept as {key}")))?;
        self.stack.push(id);
        Ok(())
    }

    fn push(&mut self, object: Object) {
        self.stack.push(self.objects.len());
        self.objects.push(object);
    }

    /// Where the last `count` values begin, all above the last mark.
    fn floor(&self, count: usize) -> Result<usize> {
        let start = self.stack.len().checked_sub(count);
        start
            .filter(|start| *start >= self.marks.last().copied().unwrap_or(0))
            .ok_or_else(|| self.error("too few values"))
    }

    fn top(&self) -> Result<usize> {
        Ok(self.stack[self.floor(1)?])
    }

    fn pop(&mut self) -> Result<usize> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn since_mark(&mut self) -> Result<Vec<usize>> {
        let mark = self.marks.pop().ok_or_else(|| self.error("no mark"))?;
        Ok(self.stack.split_off(mark))
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self, len: usize) -> Result<u64> {
        Ok(self.take(len)?.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let end =
            end.ok_or_else(|| self.error(format!("{len} bytes expected behind the end of the pickle")))?;
        Ok(&self.bytes[std::mem::replace(&mut self.at, end)..end])
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|b| *b == b'\n').ok_or_else(|| self.error("a name without an end"))?;
        let line =
            std::str::from_utf8(self.take(len)?).map_err(|_| self.error("a name that is not UTF-8"))?;
        self.take(1)?;
        Ok(line)
    }

    fn error(&self, what: impl Into<String>) -> CheckpointError {
        CheckpointError::malformed(self.path, self.started, format!("pickle: {}", what.into()))
    }
}
