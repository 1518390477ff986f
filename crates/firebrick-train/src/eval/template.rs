//! Prompts as Jinja templates over the fields of an item.

use std::io::{self, Write};
use std::thread;

use minijinja::value::Value;
use minijinja::{Environment, Error, UndefinedBehavior};
use serde_json::{Map, Value as Json};

/// The parser and the compiler nest as deep as a template is long.
const MAX_SOURCE: usize = 1 << 14;
const STACK: usize = 16 << 20;
const FUEL: u64 = 50_000;
/// Bytes of a rendered text: once, and per byte of the item.
const OUTPUT: (usize, usize) = (1 << 16, 4);

/// Compiled templates, by number. A field that an item lacks is an error, and a line end at the end of a template stays
/// (both as in lm-evaluation-harness).
///
/// Steps and output are limited; strings that a template doubles again and again on the way are not.
pub(super) struct Templates {
    env: Environment<'static>,
    count: usize,
}

impl Templates {
    /// Compiles `sources`; what fails comes back by number.
    pub fn new(sources: &[&str]) -> Result<Self, Vec<(usize, String)>> {
        let mut env = Environment::new();
        env.set_keep_trailing_newline(true);
        env.set_undefined_behavior(UndefinedBehavior::Strict);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_fuel(Some(FUEL));
        let mut problems = Vec::new();
        for (i, source) in sources.iter().enumerate() {
            if source.len() > MAX_SOURCE {
                problems.push((i, format!("a template of {} bytes, {MAX_SOURCE} allowed", source.len())));
            } else if let Err(e) = env.add_template_owned(i.to_string(), source.to_string()) {
                problems.push((i, told(&e)));
            }
        }
        if problems.is_empty() { Ok(Templates { env, count: sources.len() }) } else { Err(problems) }
    }

    /// The texts of all templates for `item`, which takes `bytes` in its file.
    pub fn render(&self, item: &Map<String, Json>, bytes: usize) -> Result<Vec<String>, String> {
        let fields = Value::from_serialize(item);
        let one = |i: usize| {
            let template = self.env.get_template(&i.to_string()).map_err(|e| told(&e))?;
            let mut out = Limited { bytes: Vec::new(), limit: OUTPUT.0 + OUTPUT.1 * bytes };
            template.render_captured_to(fields.clone(), &mut out).map_err(|e| told(&e))?;
            String::from_utf8(out.bytes).map_err(|e| e.to_string())
        };
        (0..self.count).map(one).collect()
    }
}

/// Runs `work` on a stack that holds what templates nest.
pub(super) fn deep<T: Send>(work: impl FnOnce() -> Result<T, Vec<String>> + Send) -> Result<T, Vec<String>> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| vec![format!("no thread for the templates: {e}")])?;
        thread.join().unwrap_or_else(|_| Err(vec!["the template engine panicked".into()]))
    })
}

/// The error with its causes, on one line.
fn told(error: &Error) -> String {
    let mut text = error.detail().map_or_else(|| error.kind().to_string(), String::from);
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    match error.line() {
        Some(line) => format!("line {line} of the template: {text}"),
        None => text,
    }
}

struct Limited {
    bytes: Vec<u8>,
    limit: usize,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(io::Error::other(format!("the text exceeds {} bytes", self.limit)));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, item: Json) -> Result<String, String> {
        let Json::Object(item) = item else { panic!("an object") };
        let templates = Templates::new(&[source]).map_err(|p| p[0].1.clone())?;
        templates.render(&item, 10).map(|texts| texts[0].clone())
    }

    #[test]
    fn fields_are_filled_in_and_nothing_else_changes() {
        let item = serde_json::json!({"a": "x < \"y\"", "n": 3, "list": ["p", "q"]});
        assert_eq!(render("{{ a }}: {{ n }}, {{ list[1] }} \n", item.clone()).unwrap(), "x < \"y\": 3, q \n");
        assert_eq!(
            render("{% for c in list %}{{ loop.index }}.{{ c }} {% endfor %}", item.clone()).unwrap(),
            "1.p 2.q "
        );
        assert!(render("{{ b }}", item).unwrap_err().contains("undefined"));
    }

    #[test]
    fn hostile_templates_are_cut_off() {
        let item = || serde_json::json!({"a": "x"});
        assert!(render("{% for i in range(100000) %}{{ i }}{% endfor %}", item()).is_err());
        assert!(render("{{ a", item()).unwrap_err().contains("line 1"));
        let long = "{{ 'xxxxxxxxxxxxxxxx' * 16 }}".repeat(400);
        assert!(render(&long, item()).unwrap_err().contains("exceeds"), "output is limited");
        assert!(render(&"x".repeat(1 << 15), item()).unwrap_err().contains("allowed"));
        let nested = format!("{{{{ {}1{} }}}}", "(".repeat(8000), ")".repeat(8000));
        assert!(deep(|| Ok(render(&nested, item()))).is_ok(), "nesting does not crash");
        let chain = format!("{{{{ a{} }}}}", " ~ a".repeat(4000));
        assert_eq!(deep(|| Ok(render(&chain, item()))).unwrap().unwrap().len(), 4001);
    }
}
