//! Documents as token ids with loss masks, from text, prompts with completions, and chats.

use std::path::Path;

use firebrick_models::chat::{ChatOptions, ChatTemplate, Message};
use firebrick_models::tokenizer::Tokenizer;
use serde_json::Value;

use crate::TrainError;

/// Bad lines of a file that an error names.
const NAMED: usize = 20;
/// Turns of a chat: finding the masks takes time in proportion to the square of their number.
const MAX_TURNS: usize = 1000;

/// A document as token ids, and which of them a model is to learn to predict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    /// The ids.
    pub ids: Vec<u32>,
    /// For each id, whether the loss counts its prediction (that of the first id is never asked for).
    pub learn: Vec<bool>,
    /// How many bytes of text the ids stand for.
    pub bytes: usize,
}

/// Why a line of a file is no document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub what: String,
}

impl Document {
    /// A text to learn as a whole, with what the model expects around a text, ended by the end-of-sequence token if the
    /// tokenizer has one.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn text(text: &str, tokenizer: &Tokenizer) -> Result<Self, TrainError> {
        let ids = ended(tokenizer.encode(text, true)?, tokenizer);
        Ok(Document { learn: vec![true; ids.len()], ids, bytes: text.len() })
    }

    /// A completion to learn, after a prompt that is only read; ended as [`Document::text`].
    ///
    /// # Errors
    /// [`TrainError::Mask`] if a token spans the end of the prompt, or if the tokenizer fails.
    pub fn completion(prompt: &str, completion: &str, tokenizer: &Tokenizer) -> Result<Self, TrainError> {
        let text = format!("{prompt}{completion}");
        let ids = ended(tokenizer.encode(&text, true)?, tokenizer);
        let mut head = tokenizer.encode(prompt, true)?;
        // Some tokenizers end every text themselves.
        if !ids.starts_with(&head) && head.last().is_some_and(|last| tokenizer.eos_ids().contains(last)) {
            head.pop();
        }
        if !ids.starts_with(&head) {
            let what = "a token spans the end of `prompt` and the beginning of `completion`";
            return Err(TrainError::Mask(what.into()));
        }
        let learn = (0..ids.len()).map(|i| i >= head.len()).collect();
        Ok(Document { ids, learn, bytes: text.len() })
    }

    /// A chat as its template writes it; what the template adds for the turns of `assistant` is to be learned.
    ///
    /// Where a turn begins and ends is found by writing out the chat up to there, with the head of the answer: each must
    /// be the beginning of the whole, as text and in tokens.
    ///
    /// # Errors
    /// [`TrainError::Mask`] if a beginning is written otherwise than in the whole (a template that leaves out the reasoning
    /// of earlier turns, say), or if no turn is an assistant's; if the template or the tokenizer fails.
    pub fn chat(
        messages: &[Message],
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
    ) -> Result<Self, TrainError> {
        if messages.len() > MAX_TURNS {
            return Err(TrainError::Mask(format!("{} messages; at most {MAX_TURNS}", messages.len())));
        }
        let whole = template.render(messages, &ChatOptions::default())?;
        let ids = tokenizer.encode(&whole, false)?;
        let mut learn = vec![false; ids.len()];
        for (i, _) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
            // Tokens up to the head of the answer, and up to its end.
            let place = |turns: usize, options: &ChatOptions, what: &str| {
                let other = |how: &str| TrainError::Mask(format!("messages[{i}]: {what} {how}"));
                let text = match template.render(&messages[..turns], options) {
                    Ok(text) => text,
                    Err(error) => return Err(other(&format!("can't be written: {error}"))),
                };
                if !whole.starts_with(&text) {
                    return Err(other("is written otherwise once more turns follow"));
                }
                let head = tokenizer.encode(&text, false)?;
                match ids.starts_with(&head) {
                    true => Ok(head.len()),
                    false => Err(other("ends inside a token")),
                }
            };
            let begin = place(i, &ChatOptions::answer(), "the chat up to this turn")?;
            let last = i + 1 == messages.len();
            let end = match last {
                true => ids.len(),
                false => place(i + 1, &ChatOptions::default(), "the chat with this turn")?,
            };
            learn[begin.min(end)..end].fill(true);
        }
        if !learn.contains(&true) {
            return Err(TrainError::Mask("no turn of `assistant`, so there is nothing to learn".into()));
        }
        Ok(Document { ids, learn, bytes: whole.len() })
    }

    /// Whether some of its tokens are only read.
    pub fn is_masked(&self) -> bool {
        self.learn.iter().skip(1).any(|&learn| !learn)
    }

    /// How many predictions the loss counts.
    pub fn learned(&self) -> usize {
        self.learn.iter().skip(1).filter(|&&l| l).count()
    }
}

/// Ids with the end-of-sequence token behind them.
fn ended(mut ids: Vec<u32>, tokenizer: &Tokenizer) -> Vec<u32> {
    let end = tokenizer.eos_ids().first().filter(|end| ids.last() != Some(end));
    ids.extend(end);
    ids
}

/// Reads a file: `.jsonl` has one document a line (blank lines are skipped); any other file is plain text, one document.
///
/// A line is an object with a string under `text`, with strings under `prompt` and `completion`, or with a list under
/// `messages` of objects with strings under `role` and `content`, written by the tokenizer's chat template. Other keys are
/// ignored.
///
/// # Errors
/// If the file cannot be read or has no text, with the offset if it is not UTF-8, with every bad line (the first 20 are
/// named), or if the tokenizer fails.
pub fn read_documents(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Document>, TrainError> {
    let template = ChatTemplate::of(tokenizer);
    let mut read = |line: &Line| match line {
        Line::Text(text) => Document::text(text, tokenizer),
        Line::Completion(prompt, completion) => Document::completion(prompt, completion, tokenizer),
        Line::Chat(messages) => match &template {
            Ok(template) => Document::chat(messages, template, tokenizer),
            Err(error) => Err(TrainError::Mask(format!("`messages`: {error}"))),
        },
    };
    read_lines(path, &mut read)
}

/// What a line holds.
enum Line {
    Text(String),
    Completion(String, String),
    Chat(Vec<Message>),
}

/// What `read` makes of the documents of a file.
fn read_lines<T>(
    path: &Path,
    read: &mut dyn FnMut(&Line) -> Result<T, TrainError>,
) -> Result<Vec<T>, TrainError> {
    let bytes = std::fs::read(path).map_err(|e| TrainError::io(path, e))?;
    let text = String::from_utf8(bytes).map_err(|e| TrainError::NotUtf8 {
        path: path.to_path_buf(),
        offset: e.utf8_error().valid_up_to(),
    })?;
    if text.trim().is_empty() {
        return Err(TrainError::EmptyFile { path: path.to_path_buf() });
    }
    if path.extension().is_none_or(|e| !e.eq_ignore_ascii_case("jsonl")) {
        return Ok(vec![read(&Line::Text(text))?]);
    }
    let (mut documents, mut named, mut bad, mut blank) = (Vec::new(), Vec::new(), 0, true);
    // A byte order mark is what some editors begin a file with.
    let lines = text.trim_start_matches('\u{feff}').lines().enumerate();
    for (i, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let document = parse(line).and_then(|line| {
            blank &= matches!(&line, Line::Text(text) if text.trim().is_empty());
            read(&line).map_err(|e| e.to_string())
        });
        match document {
            Ok(document) => documents.push(document),
            Err(what) => {
                bad += 1;
                if named.len() < NAMED {
                    named.push(BadLine { line: i + 1, what });
                }
            }
        }
    }
    if bad > 0 {
        let more = bad - named.len();
        return Err(TrainError::JsonLines { path: path.to_path_buf(), lines: named, more });
    }
    match blank {
        true => Err(TrainError::EmptyFile { path: path.to_path_buf() }),
        false => Ok(documents),
    }
}

fn parse(line: &str) -> Result<Line, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let Some(object) = value.as_object() else { return Err("not an object".into()) };
    let string = |key: &str| match object.get(key).map(|v| v.as_str()) {
        Some(Some(text)) => Ok(text.to_string()),
        Some(None) => Err(format!("`{key}` is not a string")),
        None => Err(format!("no `{key}`")),
    };
    let kinds = ["text", "prompt", "messages"].map(|key| object.contains_key(key));
    match kinds {
        [true, false, false] => Ok(Line::Text(string("text")?)),
        [false, true, false] => Ok(Line::Completion(string("prompt")?, string("completion")?)),
        [false, false, true] => {
            let messages = object["messages"].as_array().ok_or("`messages` is not a list")?;
            messages.iter().enumerate().map(|(i, m)| message(i, m)).collect::<Result<_, _>>().map(Line::Chat)
        }
        [false, false, false] => Err("no `text`, no `prompt` with `completion`, no `messages`".into()),
        _ => Err("more than one of `text`, `prompt` and `messages`".into()),
    }
}

fn message(i: usize, value: &Value) -> Result<Message, String> {
    let string = |key: &str| {
        let text = value.get(key).and_then(Value::as_str);
        text.ok_or_else(|| format!("messages[{i}]: no string under `{key}`"))
    };
    // Templates write these, so that leaving them out would train on another chat.
    if value.get("tool_calls").is_some_and(|calls| !calls.is_null()) {
        return Err(format!("messages[{i}]: `tool_calls` are not supported"));
    }
    Ok(Message::new(string("role")?, string("content")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_models::chat::CHATML;
    use firebrick_models::tokenizer::train_bpe;

    fn tokenizer() -> Tokenizer {
        train_bpe(["one two, one two, one two"], 264).unwrap()
    }

    /// The text of the learned tokens, runs of them apart.
    fn learned(document: &Document, tokenizer: &Tokenizer) -> Vec<String> {
        assert_eq!(document.ids.len(), document.learn.len());
        let mut runs: Vec<Vec<u32>> = Vec::new();
        let mut before = false;
        for (&id, &learn) in document.ids.iter().zip(&document.learn) {
            if learn && !before {
                runs.push(Vec::new());
            }
            if learn {
                runs.last_mut().unwrap().push(id);
            }
            before = learn;
        }
        runs.iter().map(|ids| tokenizer.decode(ids, false).unwrap()).collect()
    }

    fn chat(turns: &[(&str, &str)], template: &str) -> Result<Document, TrainError> {
        let messages: Vec<Message> = turns.iter().map(|(role, text)| Message::new(*role, *text)).collect();
        Document::chat(&messages, &ChatTemplate::new(template, None, None).unwrap(), &tokenizer())
    }

    #[test]
    fn the_turns_of_the_assistant_and_nothing_else_are_learned() {
        let turns =
            [("system", "one"), ("user", "two"), ("assistant", "two one"), ("user", "é"), ("assistant", "")];
        let document = chat(&turns, CHATML).unwrap();
        assert_eq!(learned(&document, &tokenizer()), ["two one<|im_end|>\n", "<|im_end|>\n"]);
        let whole = tokenizer().decode(&document.ids, false).unwrap();
        assert!(whole.starts_with("<|im_start|>system\none<|im_end|>"), "{whole}");
        assert_eq!(document.bytes, whole.len());
        assert!(document.learned() < document.ids.len() / 2, "control: most of it is only read");

        let reader = chat(&[("user", "one")], CHATML).unwrap_err().to_string();
        assert!(reader.contains("no turn of `assistant`"), "{reader}");
    }

    #[test]
    fn masks_that_cannot_be_exact_are_errors() {
        // Leaves out all answers but the last, as templates of reasoning models do with thoughts.
        let forgetful = "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}";
        let turns = [("user", "one"), ("assistant", "two"), ("user", "one"), ("assistant", "two")];
        let error = chat(&turns, forgetful).unwrap_err().to_string();
        assert!(error.contains("messages[1]: the chat with this turn is written otherwise"), "{error}");
        chat(&turns[..2], forgetful).unwrap();
        // No border between turns: a token spans it.
        let bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}";
        let error = chat(&[("user", "on"), ("assistant", "e")], bare).unwrap_err().to_string();
        assert!(error.contains("messages[1]: the chat up to this turn ends inside a token"), "{error}");
        chat(&[("user", "x"), ("assistant", "y")], bare).unwrap();
        let picky = "{% if not messages %}{{ raise_exception('nobody speaks') }}{% endif %}{{ messages[0]['content'] }}";
        let error = chat(&[("assistant", "two")], picky).unwrap_err().to_string();
        assert!(error.contains("nobody speaks"), "{error}");
    }

    #[test]
    fn a_completion_is_learned_after_its_prompt() {
        let tokenizer = tokenizer();
        let end = tokenizer.token(tokenizer.eos_ids()[0]).unwrap();
        let document = Document::completion("one,", " two", &tokenizer).unwrap();
        assert_eq!(learned(&document, &tokenizer), [format!(" two{end}")]);
        assert_eq!(document.ids, Document::text("one, two", &tokenizer).unwrap().ids);
        assert_eq!(document.bytes, 8);
        assert_eq!(Document::text("one", &tokenizer).unwrap().learn, [true, true]);
        let error = Document::completion("on", "e", &tokenizer).unwrap_err().to_string();
        assert!(error.contains("spans the end of `prompt`"), "{error}");
    }

    #[test]
    fn files_are_read_or_refused_with_the_place() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let read = |path: &Path| -> Result<Vec<String>, TrainError> {
            read_lines(path, &mut |line| match line {
                Line::Text(text) => Ok(text.clone()),
                Line::Completion(prompt, completion) => Ok(format!("{prompt}|{completion}")),
                Line::Chat(messages) => {
                    Ok(messages.iter().map(|m| format!("{}:{};", m.role, m.content)).collect())
                }
            })
        };
        let message = |path: &Path| read(path).unwrap_err().to_string();
        assert_eq!(read(&write("a.txt", "né\n".as_bytes())).unwrap(), ["né\n"]);
        let lines = write(
            "a.jsonl",
            b"\xef\xbb\xbf{\"text\":\"one\\n\"}\r\n\n{\"prompt\":\"a\",\"completion\":\"b\",\"id\":7}\n\
              {\"messages\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"assistant\",\"content\":\"y\"}]}",
        );
        assert_eq!(read(&lines).unwrap(), ["one\n", "a|b", "user:x;assistant:y;"]);

        assert!(message(&write("empty.txt", b" \n")).ends_with("empty.txt: the file has no text"));
        assert!(message(&write("empty.jsonl", b"")).contains("no text"));
        assert!(message(&write("blank.jsonl", b"{\"text\":\" \"}\n")).contains("no text"));
        let latin = message(&write("latin.txt", b"ab\xe9c"));
        assert!(
            latin.ends_with("latin.txt: not UTF-8: the byte at offset 2 belongs to no character"),
            "{latin}"
        );
        let bad = message(&write("bad.jsonl", b"{\"text\":\"one\"}\n{\"txt\":1}\n"));
        assert!(
            bad.ends_with("bad.jsonl:2: no `text`, no `prompt` with `completion`, no `messages`"),
            "{bad}"
        );
        assert!(message(&folder.path().join("none.txt")).contains("none.txt"));
        assert!(message(folder.path()).contains(&folder.path().display().to_string()));
    }

    #[test]
    fn all_bad_lines_are_told_up_to_a_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad.jsonl");
        let bad = [
            "{\"text\": 1}",
            "[1]",
            "{\"text\": \"a\", \"prompt\": \"b\"}",
            "{\"prompt\": \"b\"}",
            "{\"messages\": {}}",
            "{\"messages\": [{\"role\": \"user\"}]}",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"x\", \"tool_calls\": [1]}]}",
            "{\"text\": \"cut off",
            &"[".repeat(100_000),
            "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}",
        ];
        std::fs::write(&path, format!("{{\"text\": \"fine\"}}\n{}", bad.join("\n"))).unwrap();
        let mut tokenizer = tokenizer();
        tokenizer.set_chat_template(Some(CHATML.into()));
        let error = read_documents(&path, &tokenizer).unwrap_err();
        let text = error.to_string();
        let TrainError::JsonLines { lines, more, .. } = error else { panic!("{text}") };
        assert_eq!((lines.len(), more), (10, 0));
        let told = [
            "`text` is not a string",
            "not an object",
            "more than one of",
            "no `completion`",
            "`messages` is not a list",
            "messages[0]: no string under `content`",
            "messages[0]: `tool_calls`",
            "EOF",
            "recursion",
            "no turn of `assistant`",
        ];
        for (i, (line, told)) in lines.iter().zip(told).enumerate() {
            assert_eq!(line.line, i + 2);
            assert!(line.what.contains(told), "{told}: {}", line.what);
            assert!(text.contains(&format!("bad.jsonl:{}: {}", line.line, line.what)), "{text}");
        }
        std::fs::write(&path, "{}\n".repeat(50)).unwrap();
        let error = read_documents(&path, &tokenizer).unwrap_err().to_string();
        assert_eq!(error.lines().count(), 22, "{error}");
        assert!(error.ends_with("and 30 more"), "{error}");

        std::fs::write(&path, bad[9]).unwrap();
        tokenizer.set_chat_template(None);
        let error = read_documents(&path, &tokenizer).unwrap_err().to_string();
        assert!(error.contains("bad.jsonl:1: `messages`: ") && error.contains("none"), "{error}");
    }
}
