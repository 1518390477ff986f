//! Reports: facts, texts, tables and charts, written as `report.json` and as one HTML file that needs nothing else.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{AnalysisError, file};

mod chart;
mod color;
mod html;
mod number;
mod plot;
mod svg;

pub use chart::{Bar, Bars, Heatmap, Lines, Point, Row, Scatter, Series, Strips};
pub use number::number;

/// The version of the format written here.
const VERSION: u32 = 1;

/// A report, built piece by piece.
///
/// ```
/// use firebrick_analysis::{Bars, Report, Section, Table};
/// let report = Report::new("Bricks & mortar")
///     .fact("model", "SmolLM2-135M")
///     .section(
///         Section::new("Loss")
///             .text("Cross-entropy by variant, in nats per token.")
///             .bars(Bars::new("Cross-entropy").bar("base", 3.1).bar_with_error("tuned", 2.7, 0.02))
///             .table(Table::new("The same").text_column("variant").number_column("nats").row(["base".into(), 3.1.into()])),
///     );
/// let html = report.to_html();
/// assert!(html.contains("Bricks &amp; mortar") && !html.contains("src="));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the format: 1.
    pub version: u32,
    /// Heading of the page.
    pub title: String,
    /// A sentence or two under the heading.
    pub summary: Vec<String>,
    /// Names and values at the top: model, parameters, device, seed.
    pub facts: Vec<(String, String)>,
    /// The body.
    pub sections: Vec<Section>,
}

/// A headed part of a report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Section {
    /// Its heading.
    pub title: String,
    /// What it shows, in order.
    pub items: Vec<Item>,
}

/// Something a section shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Item {
    /// A paragraph.
    Text(String),
    /// A paragraph set apart: a caveat, a warning.
    Note(String),
    /// Rows of numbers over layers, as colours.
    Heatmap(Heatmap),
    /// A table.
    Table(Table),
    /// Horizontal bars.
    Bars(Bars),
    /// Curves.
    Lines(Lines),
    /// Points on a plane.
    Scatter(Scatter),
    /// A strip of points for each layer.
    Strips(Strips),
}

/// A table with typed columns.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Its caption.
    pub title: String,
    /// The columns.
    pub columns: Vec<Column>,
    /// The rows, as long as there are columns.
    pub rows: Vec<Vec<Cell>>,
    /// Numbers of rows set in bold.
    pub highlighted: Vec<usize>,
    /// Whether it starts folded.
    pub folded: bool,
}

/// A column of a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// Its heading.
    pub name: String,
    /// Numbers are set flush right with the same number of decimals.
    pub numeric: bool,
}

/// One entry of a table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Cell {
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
    /// Nothing.
    #[default]
    Empty,
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Cell::Text(text.into())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Cell::Text(text)
    }
}

impl From<f64> for Cell {
    /// Infinite values and NaN become [`Cell::Empty`]: JSON has none.
    fn from(value: f64) -> Self {
        if value.is_finite() { Cell::Number(value) } else { Cell::Empty }
    }
}

impl From<usize> for Cell {
    fn from(value: usize) -> Self {
        Cell::Number(value as f64)
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Self {
        value.map_or(Cell::Empty, Into::into)
    }
}

impl Table {
    /// A table without columns.
    pub fn new(title: impl Into<String>) -> Self {
        Table { title: title.into(), ..Table::default() }
    }

    /// Adds a column of texts.
    pub fn text_column(mut self, name: impl Into<String>) -> Self {
        self.columns.push(Column { name: name.into(), numeric: false });
        self
    }

    /// Adds a column of numbers.
    pub fn number_column(mut self, name: impl Into<String>) -> Self {
        self.columns.push(Column { name: name.into(), numeric: true });
        self
    }

    /// Adds a row after all columns are there; short rows are filled up, long ones cut.
    pub fn row(mut self, cells: impl IntoIterator<Item = Cell>) -> Self {
        let mut row: Vec<Cell> = cells.into_iter().take(self.columns.len()).collect();
        row.resize(self.columns.len(), Cell::Empty);
        self.rows.push(row);
        self
    }

    /// Sets row `row`, from 0, in bold.
    pub fn highlight(mut self, row: usize) -> Self {
        self.highlighted.push(row);
        self
    }

    /// Starts folded: for long tables.
    pub fn folded(mut self) -> Self {
        self.folded = true;
        self
    }
}

impl Section {
    /// An empty section.
    pub fn new(title: impl Into<String>) -> Self {
        Section { title: title.into(), items: Vec::new() }
    }

    /// Adds anything.
    pub fn item(mut self, item: Item) -> Self {
        self.items.push(item);
        self
    }

    /// Adds a paragraph.
    pub fn text(self, text: impl Into<String>) -> Self {
        self.item(Item::Text(text.into()))
    }

    /// Adds a paragraph set apart.
    pub fn note(self, text: impl Into<String>) -> Self {
        self.item(Item::Note(text.into()))
    }

    /// Adds a heat map.
    pub fn heatmap(self, heatmap: Heatmap) -> Self {
        self.item(Item::Heatmap(heatmap))
    }

    /// Adds a table.
    pub fn table(self, table: Table) -> Self {
        self.item(Item::Table(table))
    }

    /// Adds horizontal bars.
    pub fn bars(self, bars: Bars) -> Self {
        self.item(Item::Bars(bars))
    }

    /// Adds curves.
    pub fn lines(self, lines: Lines) -> Self {
        self.item(Item::Lines(lines))
    }

    /// Adds points on a plane.
    pub fn scatter(self, scatter: Scatter) -> Self {
        self.item(Item::Scatter(scatter))
    }

    /// Adds a strip of points for each layer.
    pub fn strips(self, strips: Strips) -> Self {
        self.item(Item::Strips(strips))
    }
}

impl Report {
    /// An empty report.
    pub fn new(title: impl Into<String>) -> Self {
        let title = title.into();
        Report { version: VERSION, title, summary: Vec::new(), facts: Vec::new(), sections: Vec::new() }
    }

    /// Adds a paragraph under the heading: what was found, in a sentence.
    pub fn summary(mut self, text: impl Into<String>) -> Self {
        self.summary.push(text.into());
        self
    }

    /// Adds a name and a value at the top.
    pub fn fact(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        self.facts.push((name.into(), value.to_string()));
        self
    }

    /// Adds a section.
    pub fn section(mut self, section: Section) -> Self {
        self.sections.push(section);
        self
    }

    /// Adds sections.
    pub fn sections(mut self, sections: impl IntoIterator<Item = Section>) -> Self {
        self.sections.extend(sections);
        self
    }

    /// The report as JSON, indented.
    pub fn to_json(&self) -> Result<String, AnalysisError> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// Reads JSON.
    ///
    /// # Errors
    /// [`AnalysisError::Json`], or [`AnalysisError::Version`] for a report of another version.
    pub fn from_json(text: &str) -> Result<Self, AnalysisError> {
        file::versioned(text, VERSION)
    }

    /// The report as one HTML page: styles and charts inside, nothing loaded from anywhere, every text escaped.
    pub fn to_html(&self) -> String {
        html::page(self)
    }

    /// Writes `report.json` and `report.html` into `folder`, each whole or not at all.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), AnalysisError> {
        let folder = folder.as_ref();
        file::write(&folder.join("report.json"), &self.to_json()?)?;
        file::write(&folder.join("report.html"), &self.to_html())
    }
}
