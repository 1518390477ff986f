//! Keeps what a template builds in between within a budget.
//!
//! minijinja counts steps and not bytes, and `s ~ s` in a loop doubles a text with every step. So whatever makes a value larger
//! (operators, lists, maps, printing, `join`, `replace`, `format`) has its result weighed: operators and literals by a filter
//! that is put around them in the source, at the places that minijinja's own parser tells.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::machinery::{WhitespaceConfig, ast, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, StringInput, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, filters};
use minijinja_contrib::pycompat;

/// The filter around what may grow; no template can call it by mistake.
const GUARD: &str = "firebrick_weighed";
/// Operands of one chain of operators between two guards.
const CHAIN: usize = 16;
/// Deepest nesting of a value, as of JSON.
const MAX_DEPTH: usize = 128;
/// What a value weighs beside its texts, in bytes.
const HEAD: usize = 24;

/// How many more bytes one rendering may make.
#[derive(Clone)]
pub(super) struct Budget {
    left: Arc<AtomicUsize>,
    /// Heaviest single value.
    limit: usize,
}

impl Budget {
    /// `total` bytes in all, and `limit` for one value.
    pub(super) fn new(total: usize, limit: usize) -> Budget {
        Budget { left: Arc::new(AtomicUsize::new(total)), limit }
    }

    pub(super) fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }

    pub(super) fn spend(&self, bytes: usize) -> Result<(), Error> {
        match self.left().checked_sub(bytes) {
            Some(left) => {
                self.left.store(left, Ordering::Relaxed);
                Ok(())
            }
            None => Err(too_much()),
        }
    }

    /// Takes the weight of `value` off the budget, and gives it back.
    pub(super) fn weigh(&self, value: &Value) -> Result<usize, Error> {
        let most = self.limit.min(self.left());
        let mut room = most;
        weigh(value, &mut room, 0)?;
        self.spend(most - room)?;
        Ok(most - room)
    }

    /// Refuses `times` texts of `bytes` more.
    fn allow(&self, times: usize, bytes: usize) -> Result<(), Error> {
        match times.checked_mul(bytes) {
            Some(bytes) if bytes <= self.limit => self.spend(bytes),
            _ => Err(too_much()),
        }
    }
}

pub(super) fn too_much() -> Error {
    Error::new(ErrorKind::InvalidOperation, "the template makes too much text")
}

/// Takes what `value` would take as text off `room`. A list that holds another twice counts it twice.
fn weigh(value: &Value, room: &mut usize, depth: usize) -> Result<(), Error> {
    let mut take = |bytes: usize| room.checked_sub(bytes).map(|left| *room = left).ok_or_else(too_much);
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, "a value nests too deep"));
    }
    if let Some(text) = value.as_str() {
        return take(HEAD + text.len());
    }
    take(HEAD)?;
    let map = value.kind() == ValueKind::Map;
    if map || matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        for item in value.try_iter().into_iter().flatten() {
            weigh(&item, room, depth + 1)?;
            if map {
                weigh(&value.get_item(&item)?, room, depth + 1)?;
            }
        }
    }
    Ok(())
}

/// Replaces in `env` what makes texts by what stays within `budget`.
pub(super) fn limit(env: &mut Environment<'_>, budget: &Budget) {
    let of = budget.clone();
    env.add_filter(GUARD, move |value: Value| of.weigh(&value).map(|_| value));
    let of = budget.clone();
    env.add_filter("join", move |state: &State, value: &Value, by: Option<StringInput<'_>>| {
        check_join(&of, value, by.as_ref().map_or("", |by| by.as_str()))?;
        filters::join(state, value, by)
    });
    let of = budget.clone();
    env.add_filter(
        "replace",
        move |state: &State, value: StringInput<'_>, from: StringInput<'_>, to: StringInput<'_>| {
            check_replace(&of, value.as_str(), from.as_str(), to.as_str())?;
            filters::replace(state, value, from, to)
        },
    );
    let of = budget.clone();
    env.add_filter("format", move |state: &State, value: &Value, rest: Rest<Value>| {
        check_format(&of, value.as_str().unwrap_or_default(), &rest)?;
        filters::format(state, value, rest)
    });
    let of = budget.clone();
    env.set_unknown_method_callback(move |state, value, method, arguments| {
        let text = value.as_str().unwrap_or_default();
        match (method, arguments) {
            ("join", [list]) => check_join(&of, list, text)?,
            ("replace", [from, to, ..]) => {
                let word = |value: &Value| value.as_str().unwrap_or_default().to_string();
                check_replace(&of, text, &word(from), &word(to))?;
            }
            ("format", rest) => check_format(&of, text, rest)?,
            _ => {}
        }
        let result = pycompat::unknown_method_callback(state, value, method, arguments)?;
        of.weigh(&result).map(|_| result)
    });
}

fn check_join(budget: &Budget, list: &Value, by: &str) -> Result<(), Error> {
    let items = budget.weigh(list)? / HEAD;
    budget.allow(items, by.len())
}

fn check_replace(budget: &Budget, text: &str, from: &str, to: &str) -> Result<(), Error> {
    budget.allow(1, text.len())?;
    budget.allow(text.matches(from).count(), to.len())
}

fn check_format(budget: &Budget, text: &str, arguments: &[Value]) -> Result<(), Error> {
    // Widths and precisions: a number of up to four digits is at most as many characters.
    let wide = text.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 4);
    if wide || text.contains('*') {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "format: a width of over four digits, or of `*`",
        ));
    }
    let mut heaviest = 10_000;
    for argument in arguments {
        heaviest = heaviest.max(budget.weigh(argument)?);
    }
    budget.allow(1, text.len())?;
    budget.allow(text.matches(['%', '{']).count(), heaviest)
}

/// `source` with guards, and the longest text that it prints as it stands inside a loop or macro.
pub(super) fn guarded(source: &str, name: &str) -> Result<(String, usize), Error> {
    let whitespace =
        WhitespaceConfig { trim_blocks: true, lstrip_blocks: true, ..WhitespaceConfig::default() };
    let tree = parse(source, name, SyntaxConfig, whitespace)?;
    let mut found = Found::default();
    found.statement(&tree, false);
    // At one place what ends comes before what begins.
    let mut cuts: Vec<(usize, bool)> =
        found.spans.iter().flat_map(|&(start, end)| [(start, true), (end, false)]).collect();
    cuts.sort_unstable();
    let mut out = String::with_capacity(source.len() + cuts.len() * GUARD.len());
    let mut done = 0;
    for (at, begins) in cuts {
        out += source.get(done..at).unwrap_or_default();
        done = at;
        match begins {
            true => out.push('('),
            false => {
                out += ")|";
                out += GUARD;
            }
        }
    }
    out += source.get(done..).unwrap_or_default();
    Ok((out, found.longest))
}

/// What was found in a template.
#[derive(Default)]
struct Found {
    /// First byte and end of what is to be guarded.
    spans: Vec<(usize, usize)>,
    longest: usize,
}

impl Found {
    fn statements(&mut self, statements: &[ast::Stmt<'_>], again: bool) {
        statements.iter().for_each(|s| self.statement(s, again));
    }

    /// `again` is whether the statement may run more than once.
    fn statement(&mut self, statement: &ast::Stmt<'_>, again: bool) {
        use ast::Stmt;
        match statement {
            Stmt::Template(s) => self.statements(&s.children, again),
            Stmt::EmitExpr(s) => self.expression(&s.expr),
            Stmt::EmitRaw(s) if again => self.longest = self.longest.max(s.raw.len()),
            Stmt::EmitRaw(_) => {}
            Stmt::ForLoop(s) => {
                self.expression(&s.iter);
                s.filter_expr.iter().for_each(|e| self.expression(e));
                self.statements(&s.body, true);
                self.statements(&s.else_body, again);
            }
            Stmt::IfCond(s) => {
                self.expression(&s.expr);
                self.statements(&s.true_body, again);
                self.statements(&s.false_body, again);
            }
            Stmt::WithBlock(s) => {
                s.assignments.iter().for_each(|(_, e)| self.expression(e));
                self.statements(&s.body, again);
            }
            Stmt::Set(s) => self.expression(&s.expr),
            Stmt::SetBlock(s) => {
                s.filter.iter().for_each(|e| self.expression(e));
                self.statements(&s.body, again);
            }
            Stmt::AutoEscape(s) => self.statements(&s.body, again),
            Stmt::FilterBlock(s) => {
                self.expression(&s.filter);
                self.statements(&s.body, again);
            }
            Stmt::Block(s) => self.statements(&s.body, true),
            Stmt::Macro(s) => self.body(s),
            Stmt::CallBlock(s) => {
                self.arguments(&s.call.args);
                self.body(&s.macro_decl);
            }
            Stmt::Do(s) => self.arguments(&s.call.args),
            // Other templates: there are none.
            Stmt::Import(_) | Stmt::FromImport(_) | Stmt::Extends(_) | Stmt::Include(_) => {}
            Stmt::Continue(_) | Stmt::Break(_) => {}
        }
    }

    fn body(&mut self, declared: &ast::Macro<'_>) {
        declared.defaults.iter().for_each(|e| self.expression(e));
        self.statements(&declared.body, true);
    }

    fn arguments(&mut self, arguments: &[ast::CallArg<'_>]) {
        use ast::CallArg::*;
        for argument in arguments {
            let (Pos(e) | Kwarg(_, e) | PosSplat(e) | KwargSplat(e)) = argument;
            self.expression(e);
        }
    }

    fn expression(&mut self, expression: &ast::Expr<'_>) {
        use ast::Expr;
        match expression {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::BinOp(_) => self.chain(expression),
            Expr::List(e) => {
                e.items.iter().for_each(|e| self.expression(e));
                self.guard(expression);
            }
            Expr::Map(e) => {
                e.keys.iter().chain(&e.values).for_each(|e| self.expression(e));
                self.guard(expression);
            }
            Expr::Slice(e) => {
                self.expression(&e.expr);
                [&e.start, &e.stop, &e.step].into_iter().flatten().for_each(|e| self.expression(e));
            }
            Expr::UnaryOp(e) => self.expression(&e.expr),
            Expr::Compare(e) => {
                self.expression(&e.expr);
                e.ops.iter().for_each(|op| self.expression(&op.expr));
            }
            Expr::IfExpr(e) => {
                self.expression(&e.test_expr);
                self.expression(&e.true_expr);
                e.false_expr.iter().for_each(|e| self.expression(e));
            }
            Expr::Filter(e) => {
                e.expr.iter().for_each(|e| self.expression(e));
                self.arguments(&e.args);
            }
            Expr::Test(e) => {
                self.expression(&e.expr);
                self.arguments(&e.args);
            }
            Expr::GetAttr(e) => self.expression(&e.expr),
            Expr::GetItem(e) => {
                self.expression(&e.expr);
                self.expression(&e.subscript_expr);
            }
            Expr::Call(e) => {
                self.expression(&e.expr);
                self.arguments(&e.args);
            }
        }
    }

    /// A chain of operators, `a + b + c`: guarded as a whole, and in between at every [`CHAIN`] operands, for guards nest and the
    /// parser follows only so far. Literals are as long as the source at most and do not count.
    fn chain(&mut self, outermost: &ast::Expr<'_>) {
        use ast::BinOpKind::{Add, Concat, Mul};
        let (mut at, mut since) = (outermost, CHAIN);
        while let ast::Expr::BinOp(e) = at {
            if matches!(e.op, Add | Concat | Mul) {
                if since >= CHAIN {
                    self.guard(at);
                    since = 0;
                }
                since += usize::from(!matches!(e.right, ast::Expr::Const(_)));
            }
            if matches!(e.op, Mul) {
                // Or the compiler would multiply constant texts, and keep them.
                [&e.left, &e.right]
                    .into_iter()
                    .filter(|e| matches!(e, ast::Expr::Const(_)))
                    .for_each(|e| self.guard(e));
                since = CHAIN;
            }
            self.expression(&e.right);
            at = &e.left;
        }
        self.expression(at);
    }

    fn guard(&mut self, expression: &ast::Expr<'_>) {
        let span = expression.span();
        self.spans.push((span.start_offset as usize, span.end_offset as usize));
    }
}
