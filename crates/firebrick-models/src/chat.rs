//! Chat templates: Jinja with the conventions of Hugging Face's `apply_chat_template`, without its clock.

use std::io::{self, Write};
use std::thread;

use minijinja::value::{ArgType, Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, escape_formatter};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::ModelError;
use crate::tokenizer::Tokenizer;

mod growth;

use growth::{Budget, too_much};

/// The ChatML template: each message between `<|im_start|>role` and `<|im_end|>`, and nothing else.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    /// A system message.
    pub fn system(content: impl Into<String>) -> Message {
        Message::new("system", content)
    }

    /// A user's message.
    pub fn user(content: impl Into<String>) -> Message {
        Message::new("user", content)
    }

    /// A model's message.
    pub fn assistant(content: impl Into<String>) -> Message {
        Message::new("assistant", content)
    }
}

/// What a template may ask for besides the messages.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// Whether the prompt ends with the head of the assistant's answer.
    pub add_generation_prompt: bool,
    /// What `strftime_now` tells; without it that function is undefined, which templates test for.
    pub now: Option<DateTime>,
    /// Further variables (`tools`, `documents`, `enable_thinking`, ...); they override the usual ones.
    pub variables: serde_json::Map<String, Json>,
}

impl ChatOptions {
    /// Options for asking a model to answer.
    pub fn answer() -> ChatOptions {
        ChatOptions { add_generation_prompt: true, ..ChatOptions::default() }
    }
}

/// A compiled chat template.
///
/// Templates come from downloaded files: a rendering is cut off after a number of steps and bytes that grow with the
/// messages (what it builds in between counts too), and a template reaches nothing but its variables.
///
/// ```
/// use firebrick_models::chat::{CHATML, ChatOptions, ChatTemplate, Message};
/// let template = ChatTemplate::new(CHATML, None, None)?;
/// let prompt = template.render(&[Message::user("Hi")], &ChatOptions::answer())?;
/// assert_eq!(prompt, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
/// # Ok::<(), firebrick_models::ModelError>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: Option<String>,
    eos: Option<String>,
    /// Most steps that leave what it prints in between within bounds.
    most_steps: u64,
}

const NAME: &str = "chat_template";
const MAX_SOURCE: usize = 1 << 16;
const STACK: usize = 64 << 20; // a chain of operators nests as deep as it is long
const MAX_DEPTH: usize = 128; // of JSON, as in serde_json
const MAX_INDENT: usize = 64;
const FUEL: (u64, u64) = (100_000, 5_000); // once, and per message
const OUTPUT: (usize, usize) = (1 << 20, 4); // once, and per byte of input
const BUILT: (usize, usize) = (128 << 20, 1024); // in all that goes in between, likewise

impl ChatTemplate {
    /// Compiles `source`; `bos` and `eos` are the texts of the tokens, as the variables `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] with the line when the source does not parse, or when it is longer than 64 KiB.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<ChatTemplate, ModelError> {
        if source.len() > MAX_SOURCE {
            return Err(ModelError::ChatTemplate(format!(
                "{} bytes of source, {MAX_SOURCE} allowed",
                source.len()
            )));
        }
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.add_function("raise_exception", raise_exception);
        // Jinja reads every line end as a newline.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let longest = deep(|| {
            let (guarded, longest) =
                growth::guarded(&plain_generation_tags(&source), NAME).map_err(|e| failed(&e))?;
            env.add_template_owned(NAME, guarded).map_err(|e| failed(&e))?;
            Ok(longest)
        })?;
        let most_steps = (BUILT.0 / longest.max(1)) as u64;
        Ok(ChatTemplate { env, bos: bos.map(String::from), eos: eos.map(String::from), most_steps })
    }

    /// The template that came with `tokenizer`.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] when it has none (a base model), or one that does not parse.
    pub fn of(tokenizer: &Tokenizer) -> Result<ChatTemplate, ModelError> {
        let source = tokenizer
            .chat_template()
            .ok_or_else(|| ModelError::ChatTemplate("this tokenizer has none".into()))?;
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
        ChatTemplate::new(
            source,
            text(tokenizer.bos_id()).as_deref(),
            text(tokenizer.eos_ids().first().copied()).as_deref(),
        )
    }

    /// The prompt for `messages`.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] with the template's own message where it raises one (roles that do not alternate,
    /// say), with the line where it fails, or when it exceeds its limits.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String, ModelError> {
        let mut variables: Vec<(String, Value)> = vec![
            ("messages".into(), Value::from_serialize(messages)),
            ("add_generation_prompt".into(), options.add_generation_prompt.into()),
            ("tools".into(), Value::from(())),
            ("documents".into(), Value::from(())),
        ];
        variables.extend(self.bos.iter().map(|t| ("bos_token".into(), Value::from(t.as_str()))));
        variables.extend(self.eos.iter().map(|t| ("eos_token".into(), Value::from(t.as_str()))));
        if let Some(now) = options.now {
            let tell = move |format: &str| {
                now.format(format).map_err(|e| Error::new(ErrorKind::InvalidOperation, e))
            };
            variables.push(("strftime_now".into(), Value::from_function(tell)));
        }
        variables.extend(
            options.variables.iter().map(|(name, value)| (name.clone(), Value::from_serialize(value))),
        );

        let said: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let given = said + options.variables.values().map(|v| v.to_string().len()).sum::<usize>();
        let mut env = self.env.clone();
        env.set_fuel(Some((FUEL.0 + FUEL.1 * messages.len() as u64).min(self.most_steps)));
        let limit = OUTPUT.0 + OUTPUT.1 * given;
        let built = Budget::new(BUILT.0 + BUILT.1 * given, limit);
        growth::limit(&mut env, &built);
        env.set_formatter(move |out, state, value| {
            built.weigh(value)?;
            python_format(out, state, value)
        });
        let left = Budget::new(limit, limit);
        let of = left.clone();
        env.add_filter("tojson", move |value: Value, options: Kwargs| tojson(&value, &options, &of));
        env.add_filter("indent", move |text: String, width, first, blank, options: Kwargs| {
            indent(&text, width, first, blank, &options, &left)
        });
        let mut out = Limited { bytes: Vec::with_capacity(2 * said), limit };
        deep(|| {
            let template = env.get_template(NAME).map_err(|e| failed(&e))?;
            template.render_captured_to(Value::from_iter(variables), &mut out).map_err(|e| failed(&e))
        })?;
        String::from_utf8(out.bytes).map_err(|e| ModelError::ChatTemplate(e.to_string()))
    }

    /// The token ids of the prompt for `messages`: the template has written all special tokens, none are added.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`] and [`Tokenizer::encode`].
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<Vec<u32>, ModelError> {
        tokenizer.encode(&self.render(messages, options)?, false)
    }
}

/// Runs `work` on a stack that holds what the parser and the compiler nest.
fn deep<T: Send>(work: impl FnOnce() -> Result<T, ModelError> + Send) -> Result<T, ModelError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| ModelError::ChatTemplate(format!("no thread to run it on: {e}")))?;
        thread.join().unwrap_or_else(|_| Err(ModelError::ChatTemplate("the template engine panicked".into())))
    })
}

fn failed(error: &Error) -> ModelError {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    ModelError::ChatTemplate(text)
}

/// Output that refuses to grow beyond a limit.
struct Limited {
    bytes: Vec<u8>,
    limit: usize,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(io::Error::other(format!("the prompt exceeds {} bytes", self.limit)));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `{% generation %}` marks the model's words for training masks; it prints its body, as `{% if true %}` does.
fn plain_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start + 2..].find("%}") else { break };
        let tag = &rest[start + 2..start + 2 + length];
        let name = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out += &rest[..start + 2];
        match name {
            "generation" => out += &tag.replacen(name, "if true", 1),
            "endgeneration" => out += &tag.replacen(name, "endif", 1),
            _ => out += tag,
        }
        rest = &rest[start + 2 + length..];
    }
    out + rest
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
}

/// Prints `None`, `True` and `False` as Python does.
fn python_format(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.write_str("None").map_err(Error::from),
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }).map_err(Error::from),
        _ => escape_formatter(out, state, value),
    }
}

/// Jinja's filter of this name, within limits: a newline at the end goes, empty lines stay empty unless `blank`.
fn indent(
    text: &str,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    options: &Kwargs,
    budget: &Budget,
) -> Result<Value, Error> {
    fn or<'a, T>(given: Option<T>, options: &'a Kwargs, name: &'a str, default: T) -> Result<T, Error>
    where
        Option<T>: ArgType<'a, Output = Option<T>>,
    {
        Ok(given.map_or_else(|| options.get::<Option<T>>(name), |v| Ok(Some(v)))?.unwrap_or(default))
    }
    let width = or(width, options, "width", 4)?;
    let (first, blank) = (or(first, options, "first", false)?, or(blank, options, "blank", false)?);
    options.assert_all_used()?;
    if width > MAX_INDENT {
        let what = format!("indent: a width of {width}, {MAX_INDENT} allowed");
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    let text = text.strip_suffix('\n').unwrap_or(text);
    budget.spend(text.len() + (text.matches('\n').count() + 1) * width)?;
    let line = |(i, line): (usize, &str)| {
        let wide = if (i > 0 || first) && (blank || !line.is_empty()) { width } else { 0 };
        format!("{:wide$}{line}", "")
    };
    Ok(text.split('\n').enumerate().map(line).collect::<Vec<_>>().join("\n").into())
}

/// Python's `json.dumps` with `ensure_ascii` off, as Hugging Face's filter of this name.
fn tojson(value: &Value, options: &Kwargs, budget: &Budget) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let style = JsonStyle {
        indent: indent.map(|n| n.min(MAX_INDENT)),
        item: separators
            .as_ref()
            .and_then(|s| s.first().cloned())
            .unwrap_or(if indent.is_some() { "," } else { ", " }.into()),
        key: separators.as_ref().and_then(|s| s.get(1).cloned()).unwrap_or(": ".into()),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        limit: budget.left(),
    };
    options.assert_all_used()?;
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    budget.spend(out.len())?;
    Ok(Value::from_safe_string(out))
}

struct JsonStyle {
    indent: Option<usize>,
    item: String,
    key: String,
    sorted: bool,
    ascii: bool,
    /// Longest output in bytes.
    limit: usize,
}

impl JsonStyle {
    // Values are walked as they are: two lines of a template make one whose JSON is exponentially larger.
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            let what = format!("tojson: nested deeper than {MAX_DEPTH}");
            return Err(Error::new(ErrorKind::BadSerialization, what));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                self.block(out, ('[', ']'), value.try_iter()?, depth, |out, item| {
                    self.write(out, &item, depth + 1)
                })
            }
            ValueKind::Map => {
                let mut keys: Vec<(String, Value)> =
                    value.try_iter()?.map(|key| Ok((key_text(&key)?, key))).collect::<Result<_, Error>>()?;
                if self.sorted {
                    keys.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.block(out, ('{', '}'), keys.into_iter(), depth, |out, (name, key)| {
                    self.text(out, &name)?;
                    self.push(out, &self.key)?;
                    self.write(out, &value.get_item(&key)?, depth + 1)
                })
            }
            _ => match json(value)? {
                Json::String(text) => self.text(out, &text),
                plain => self.push(out, &plain.to_string()),
            },
        }
    }

    fn block<T>(
        &self,
        out: &mut String,
        ends: (char, char),
        items: impl Iterator<Item = T>,
        depth: usize,
        mut each: impl FnMut(&mut String, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| match self.indent {
            Some(width) => self.push(out, &format!("\n{:1$}", "", width * depth)),
            None => Ok(()),
        };
        out.push(ends.0);
        let mut any = false;
        for item in items {
            if any {
                self.push(out, &self.item)?;
            }
            any = true;
            line(out, depth + 1)?;
            each(out, item)?;
        }
        if any {
            line(out, depth)?;
        }
        self.push(out, ends.1.encode_utf8(&mut [0; 4]))
    }

    fn text(&self, out: &mut String, text: &str) -> Result<(), Error> {
        let quoted = Json::from(text).to_string();
        if !self.ascii {
            return self.push(out, &quoted);
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    self.push(out, &format!("\\u{unit:04x}"))?;
                }
            }
        }
        Ok(())
    }

    fn push(&self, out: &mut String, text: &str) -> Result<(), Error> {
        if out.len() + text.len() > self.limit {
            return Err(too_much());
        }
        *out += text;
        Ok(())
    }
}

fn json(value: &Value) -> Result<Json, Error> {
    serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// The text of a map's key, as Python writes it in JSON.
fn key_text(key: &Value) -> Result<String, Error> {
    match json(key)? {
        Json::String(text) => Ok(text),
        Json::Array(_) | Json::Object(_) => {
            Err(Error::new(ErrorKind::BadSerialization, "tojson: a key that is no text"))
        }
        plain => Ok(plain.to_string()),
    }
}

/// A moment of the proleptic Gregorian calendar, without a time zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    year: i32,
    month: u32,
    day: u32,
    second: u32, // of the day
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl DateTime {
    /// Midnight of a day: year 1 to 9999, month and day counted from 1.
    ///
    /// # Errors
    /// [`ModelError::Config`] when there is no such day.
    pub fn date(year: i32, month: u32, day: u32) -> Result<DateTime, ModelError> {
        let known = (1..=9999).contains(&year)
            && (1..=12).contains(&month)
            && (1..=days_in(year, month)).contains(&day);
        if !known {
            return Err(ModelError::Config(format!("there is no day {year:04}-{month:02}-{day:02}")));
        }
        Ok(DateTime { year, month, day, second: 0 })
    }

    /// The moment `seconds` (of 86400) after midnight of this day; more seconds wrap around.
    pub fn at(self, seconds: u32) -> DateTime {
        DateTime { second: seconds % 86_400, ..self }
    }

    /// Days of the year before this one.
    fn day_of_year(self) -> u32 {
        (1..self.month).map(|m| days_in(self.year, m)).sum::<u32>() + self.day - 1
    }

    /// 0 is Sunday.
    fn weekday(self) -> usize {
        let years = self.year - 1;
        // 31 December of the year 0 was a Sunday.
        ((years + years / 4 - years / 100 + years / 400) as u32 + self.day_of_year() + 1) as usize % 7
    }

    /// C's `strftime` in English, for the directives that templates use.
    fn format(self, format: &str) -> Result<String, String> {
        let (hour, minute, second) = (self.second / 3600, self.second / 60 % 60, self.second % 60);
        let half = if hour % 12 == 0 { 12 } else { hour % 12 };
        let (month, weekday) = (MONTHS[self.month as usize - 1], WEEKDAYS[self.weekday()]);
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut directive = chars.next();
            let bare = directive == Some('-');
            if bare {
                directive = chars.next();
            }
            let two = |n: u32| if bare { n.to_string() } else { format!("{n:02}") };
            out += &match directive {
                Some('Y') => format!("{:04}", self.year),
                Some('y') => two(self.year as u32 % 100),
                Some('m') => two(self.month),
                Some('d') => two(self.day),
                Some('e') => format!("{:2}", self.day),
                Some('H') => two(hour),
                Some('I') => two(half),
                Some('M') => two(minute),
                Some('S') => two(second),
                Some('j') => format!("{:03}", self.day_of_year() + 1),
                Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
                Some('B') => month.into(),
                Some('b') => month[..3].into(),
                Some('A') => weekday.into(),
                Some('a') => weekday[..3].into(),
                Some('F') => format!("{:04}-{:02}-{:02}", self.year, self.month, self.day),
                Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
                Some('%') => "%".into(),
                other => {
                    return Err(format!(
                        "strftime_now: %{} is not supported",
                        other.map(String::from).unwrap_or_default()
                    ));
                }
            };
        }
        Ok(out)
    }
}

fn days_in(year: i32, month: u32) -> u32 {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 => 28 + u32::from(leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, variables: Json) -> Result<String, ModelError> {
        let Json::Object(variables) = variables else { panic!("variables are an object") };
        let options = ChatOptions {
            variables,
            now: Some(DateTime::date(2024, 7, 26).unwrap()),
            ..ChatOptions::default()
        };
        ChatTemplate::new(source, Some("<s>"), Some("</s>"))?.render(&[Message::user("hi")], &options)
    }

    fn check(source: &str, expected: &str) {
        assert_eq!(render(source, serde_json::json!({})).unwrap(), expected, "{source}");
    }

    #[test]
    fn conventions_of_hugging_face() {
        check("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>");
        check("{% if tools is none %}no{% endif %}{{ missing }}", "no");
        check("a\r\n{{ 'b\r' }}", "a\nb\n");
        check("{{ none }} {{ true }} {{ 1 == 2 }}", "None True False");
        // trim_blocks and lstrip_blocks: a line with only a tag leaves nothing behind.
        check("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc");
        check(
            "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "02",
        );
        check("{{ ' x '.strip() ~ 'ab'.upper() ~ 'a,b'.split(',')[-1] }}", "xABb");
        check(
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        );
        check("{%- generation -%} x {%- endgeneration %}", "x");
        check("{{ '{% generation' }}", "{% generation");
        check("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('y') }}", "<y>");
        check("{{ messages[0].get('name', 'nobody') }}{{ '<' }}", "nobody<");
    }

    #[test]
    fn tojson_is_pythons() {
        let variables = || serde_json::json!({"x": {"b": 1, "a": [1.5, true, null, "é<\"\n"], "c": {}}});
        assert_eq!(
            render("{{ x | tojson }}", variables()).unwrap(),
            r#"{"b": 1, "a": [1.5, true, null, "é<\"\n"], "c": {}}"#
        );
        assert_eq!(
            render("{{ x | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}", variables()).unwrap(),
            "{\n  \"a\": [\n    1.5,\n    true,\n    null,\n    \"\\u00e9<\\\"\\n\"\n  ],\n  \"b\": 1,\n  \"c\": {}\n}"
        );
        assert_eq!(render("{{ [1, 2] | tojson(separators=(',', ':')) }}", variables()).unwrap(), "[1,2]");
        assert!(render("{{ x | tojson(colour=1) }}", variables()).is_err());
        check("{{ {1: none, true: missing} | tojson }}", r#"{"1": null, "true": null}"#);
        check("{{ messages | tojson }}", r#"[{"role": "user", "content": "hi"}]"#);
    }

    #[test]
    fn dates_come_from_the_caller() {
        check("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024");
        check(
            "{{ strftime_now('%A, %B %-d, %y %j %F %T %I%p %%') }}",
            "Friday, July 26, 24 208 2024-07-26 00:00:00 12AM %",
        );
        let template =
            ChatTemplate::new("{% if strftime_now is defined %}now{% else %}never{% endif %}", None, None)
                .unwrap();
        assert_eq!(template.render(&[], &ChatOptions::default()).unwrap(), "never");
        let weekday = |y, m, d| WEEKDAYS[DateTime::date(y, m, d).unwrap().weekday()];
        assert_eq!(
            [weekday(1970, 1, 1), weekday(2000, 2, 29), weekday(1, 1, 1)],
            ["Thursday", "Tuesday", "Monday"]
        );
        assert_eq!(
            DateTime::date(2025, 3, 4).unwrap().at(13 * 3600 + 62).format("%H:%M:%S %I %p").unwrap(),
            "13:01:02 01 PM"
        );
        assert!(
            DateTime::date(2023, 2, 29).is_err()
                && DateTime::date(2023, 13, 1).is_err()
                && DateTime::date(0, 1, 1).is_err()
        );
        assert!(render("{{ strftime_now('%Q') }}", serde_json::json!({})).is_err());
    }

    #[test]
    fn errors_say_what_and_where() {
        let text = |source: &str| render(source, serde_json::json!({})).unwrap_err().to_string();
        assert!(text("{{ raise_exception('Roles must alternate') }}").contains("Roles must alternate"));
        assert!(text("a\n{% if %}").contains(":2"), "{}", text("a\n{% if %}"));
        assert!(text("{{ missing.name }}").contains("undefined"));
        assert!(text("{% include 'other' %}").contains("other"));
        assert!(text("{%}{% generation %}").contains("syntax error"), "{}", text("{%}{% generation %}"));
    }

    #[test]
    fn templates_can_not_run_on() {
        let hostile = [
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
            "{% set big = 'x' * 1000000 %}{% for i in range(1000) %}{{ big }}{% endfor %}",
            "{{ 'x' * 99999999999 }}",
            "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}",
            "{% set ns = namespace(x=[]) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            "{% set n = ['x' * 9999] * 2 %}{{ ([1] * 9999) | tojson(separators=n) }}",
            "{% for i in range(9999) %}{% set big = messages | tojson(indent=64, separators=['x' * 999, '']) %}{% endfor %}",
            "{{ 'x' | indent(99999999999, true) }}",
            "{% for i in range(9999) %}{% set big = ('x\n' * 999) | indent(64) %}{% endfor %}",
            "{% set ns = namespace(s='ab') %}{% for i in range(90) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "{% set ns = namespace(s='ab') %}{% for i in range(90) %}{% set ns.s = ns.s + ns.s + '' %}{% endfor %}",
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | upper }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
            "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(s='ab') %}{% for i in range(90) %}{% set ns.s = f(ns.s) %}{% endfor %}",
            "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('ab') }}",
            "{% set big %}{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}",
            "{{ ([1] * 99999999999) | join }}",
            "{{ ('x' * 9999) | replace('x', 'y' * 9999) }}",
            "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
            "{{ ('x' * 99999).join(range(99999)) }}",
            "{{ range(99999) | map('default', 'x') | join('x' * 99999) }}",
            "{{ '%999999999d' | format(1) }}",
            "{{ '{:999999999}'.format(1) }}",
            "{{ ('%s' * 9999) | format(*(range(9999) | list)) | replace('9', 'x' * 9999) }}",
        ];
        let texts = ("{% for i in range(99999) %}", "x".repeat(9999), "{% endfor %}");
        let printed = format!("{{% set a %}}{}{}{}{{% endset %}}", texts.0, texts.1, texts.2);
        for source in hostile.into_iter().chain([printed.as_str()]) {
            let error = render(source, serde_json::json!({})).unwrap_err();
            assert!(matches!(error, ModelError::ChatTemplate(_)), "{source}: {error}");
        }
        assert!(ChatTemplate::new(&"{".repeat(MAX_SOURCE + 1), None, None).is_err());
        assert!(ChatTemplate::new(&"{{ (".repeat(MAX_SOURCE / 4), None, None).is_err());
    }

    #[test]
    fn long_chains_of_operators_do_not_overflow_the_stack() {
        let chain = |head: &str, link: &str, tail: &str| {
            let links = link.repeat((MAX_SOURCE - head.len() - tail.len()) / link.len());
            render(&format!("{head}{links}{tail}"), serde_json::json!({}))
        };
        let sum = chain("{{ 1", "+1", " }}").unwrap();
        assert_eq!(sum, ((MAX_SOURCE - 7) / 2 + 1).to_string());
        assert_eq!(chain("{{ true", " and 1", " }}").unwrap(), "1");
        // Errors or not: none of these may take the process down.
        let others = [
            ("{{ ", "not ", "true }}"),
            ("{{ ", "-", "1 }}"),
            ("{{ 1", "~1", " }}"),
            ("{{ x", ".x", " }}"),
            ("{{ x", "[0]", " }}"),
            ("{{ x", "()", " }}"),
            ("{{ 'x'", "|upper", " }}"),
            ("{{ 1", " if 1 else 1", " }}"),
            ("{{ ", "[", "1 }}"),
            ("{% if 0 %}", "{% elif 0 %}", "{% endif %}"),
            ("", "{% if 1 %}", ""),
            ("{{ 1", "<1", " }}"),
            ("{{ 2", "**1", " }}"),
        ];
        for (head, link, tail) in others {
            drop(chain(head, link, tail));
        }
    }

    #[test]
    fn guards_change_nothing_else() {
        let unguarded = |source: &str| {
            let mut env = Environment::new();
            env.set_trim_blocks(true);
            env.set_lstrip_blocks(true);
            env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
            env.set_formatter(python_format);
            env.add_template_owned(NAME, source.to_string()).ok()?;
            let variables = serde_json::json!({"messages": [Message::user("hi")]});
            env.get_template(NAME).ok()?.render(variables).ok()
        };
        let long = format!("{{{{ 'a'{} }}}}", " ~ messages[0].content".repeat(200));
        let sources = [
            "{{ 1 + 2 * 3 - 4 }}{{ (1 + 2) * 3 }}{{ 2 * 'ab' }}{{ -1 + 2 }}",
            "{{ 'a' ~ 1 + 2 ~ ('b' ~ 'c' | upper) | lower }}",
            "{% set x = [1, 'a' ~ 'b', [2]] %}{{ x[1] ~ x[2][0] + 'c' }}{{ ([1] + [2]) | length }}",
            "{% set x = {'a': 1 + 1, 'b': ['c' * 2]} %}{{ x.a }}{{ x['b'][0] }}",
            "{% for a, b in [(1, 2), (3 + 1, 4)] %}{{ a + b }},{% endfor %}",
            "{{ 'b' in ['a', 'b'] and 'x' ~ 'y' in 'wxyz' }}",
            "{{ ('a' ~ 'b' if 1 + 1 == 2 else 'c') ~ (messages[0 + 0].content[1 - 1:1 + 0]) }}",
            "{% macro f(x='d' ~ 'e') %}{{ x ~ caller() }}{% endmacro %}{% call f('g' ~ 'h') %}{{ 'i' ~ 'j' }}{% endcall %}",
            "{{ ['a', 'b'] | join(', ') }}{{ ', '.join(['c', 'd']) }}{{ 'aXa'.replace('X', '-') | replace('a', 'b') }}",
            "{{ '%s-%s' | format('a' + 'b', 2) }}{{ '{}{}'.format(1, 'b') }}",
            "{{ \"é\" ~ 'ü' }}{# ~ + #}{{ '~' + \"+\" }}{% raw %}{{ a ~ b }}{% endraw %}",
            &long,
        ];
        for source in sources {
            let expected = unguarded(source);
            assert!(expected.is_some(), "{source}");
            assert_eq!(render(source, serde_json::json!({})).ok(), expected, "{source}");
            assert_ne!(growth::guarded(source, NAME).unwrap().0, source, "control: it has guards");
        }
    }

    #[test]
    fn indent_is_jinjas() {
        check("{{ 'a\nb' | indent }}", "a\n    b");
        check("{{ 'a\nb' | indent(2, true) }}", "  a\n  b");
        check("{{ 'a\n\nb' | indent(width=1, blank=true) }}", "a\n \n b");
        assert!(render("{{ 'a' | indent(wide=1) }}", serde_json::json!({})).is_err());
    }

    #[test]
    fn limits_grow_with_the_chat() {
        let messages: Vec<Message> =
            (0..2000).map(|i| Message::new(["user", "assistant"][i % 2], "word ".repeat(200))).collect();
        let template = ChatTemplate::new(CHATML, None, None).unwrap();
        let prompt = template.render(&messages, &ChatOptions::answer()).unwrap();
        assert_eq!(prompt.matches("<|im_start|>").count(), 2001);
    }
}
