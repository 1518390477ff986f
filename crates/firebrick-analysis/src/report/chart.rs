//! The charts of a report, as data.

use serde::{Deserialize, Serialize};

/// Rows of numbers over columns (layers, mostly), as colours: dark is low, bright is high.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Heatmap {
    /// Its caption.
    pub title: String,
    /// What a column is: `layer`.
    pub unit: String,
    /// The labels of the columns.
    pub columns: Vec<String>,
    /// One row per metric or part.
    pub rows: Vec<Row>,
    /// Whether all rows share one colour scale; else each has its own.
    pub shared: bool,
    /// Whether cells are square and hold no numbers: for a matrix of layers by layers.
    #[serde(default)]
    pub square: bool,
}

/// One row of a heat map.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What is measured.
    pub label: String,
    /// One value per column; `None` where there is none.
    pub values: Vec<Option<f64>>,
    /// Colours by the logarithm; falls back to linear where a value is not positive.
    pub log: bool,
}

/// Horizontal bars from 0.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bars {
    /// Its caption.
    pub title: String,
    /// The bars, from top to bottom.
    pub bars: Vec<Bar>,
}

/// One bar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bar {
    /// Its name.
    pub label: String,
    /// Its length; bars with a negative value grow to the left.
    pub value: f64,
    /// Standard error, drawn as a whisker.
    pub error: Option<f64>,
    /// Whether it is the one the reader should see.
    pub highlight: bool,
}

/// Curves over a common axis.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lines {
    /// Its caption.
    pub title: String,
    /// Name and unit of the horizontal axis.
    pub x_label: String,
    /// Name and unit of the vertical axis.
    pub y_label: String,
    /// The places on the horizontal axis, rising.
    pub x: Vec<f64>,
    /// The curves.
    pub series: Vec<Series>,
    /// Places the points by their number, not by `x`: for steps like 1, 2, 4, 8.
    pub even: bool,
    /// Vertical axis by the logarithm; falls back to linear where a value is not positive.
    pub log: bool,
}

/// One curve.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// One value per place; `None` interrupts the curve.
    pub y: Vec<Option<f64>>,
}

/// Points on a plane: quality against size, mostly.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scatter {
    /// Its caption.
    pub title: String,
    /// Name and unit of the horizontal axis.
    pub x_label: String,
    /// Name and unit of the vertical axis.
    pub y_label: String,
    /// The points.
    pub points: Vec<Point>,
    /// Vertical axis by the logarithm; falls back to linear where a value is not positive.
    pub log: bool,
    /// Draws a line through the points that no other beats on both axes, where less is better.
    pub front: bool,
}

/// One point.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// What it is.
    pub label: String,
    /// The kind it belongs to; each kind has a colour and a shape.
    pub kind: String,
    /// Its place.
    pub x: f64,
    /// Its place.
    pub y: f64,
    /// Whether its label stands beside it.
    pub named: bool,
}

/// A strip of points for each column (layers, mostly): how values are spread there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Strips {
    /// Its caption.
    pub title: String,
    /// What a column is: `layer`.
    pub unit: String,
    /// Name and unit of the vertical axis.
    pub y_label: String,
    /// The values of each column.
    pub columns: Vec<Vec<f64>>,
    /// Vertical axis by the logarithm; falls back to linear where a value is not positive.
    pub log: bool,
}

fn finite(values: impl IntoIterator<Item = Option<f64>>) -> Vec<Option<f64>> {
    values.into_iter().map(|v| v.filter(|v| v.is_finite())).collect()
}

impl Heatmap {
    /// A heat map over `columns` columns named `0`, `1`, ...; `unit` says what they are.
    pub fn new(title: impl Into<String>, unit: impl Into<String>, columns: usize) -> Self {
        let columns = (0..columns).map(|c| c.to_string()).collect();
        Heatmap { title: title.into(), unit: unit.into(), columns, ..Heatmap::default() }
    }

    /// Other names for the columns.
    pub fn columns(mut self, names: impl IntoIterator<Item = String>) -> Self {
        self.columns = names.into_iter().collect();
        self
    }

    /// Adds a row.
    pub fn row(mut self, row: Row) -> Self {
        self.rows.push(row);
        self
    }

    /// One colour scale for all rows.
    pub fn shared_scale(mut self) -> Self {
        self.shared = true;
        self
    }

    /// Square cells without numbers.
    pub fn square(mut self) -> Self {
        self.square = true;
        self
    }
}

impl Row {
    /// A row of values; those that are not finite count as missing.
    pub fn new(label: impl Into<String>, values: impl IntoIterator<Item = Option<f64>>) -> Self {
        Row { label: label.into(), values: finite(values), log: false }
    }

    /// Colours by the logarithm.
    pub fn log(mut self) -> Self {
        self.log = true;
        self
    }
}

impl Bars {
    /// A chart without bars.
    pub fn new(title: impl Into<String>) -> Self {
        Bars { title: title.into(), bars: Vec::new() }
    }

    /// Adds a bar; one that is not finite is left out.
    pub fn bar(self, label: impl Into<String>, value: f64) -> Self {
        self.push(Bar { label: label.into(), value, ..Bar::default() })
    }

    /// Adds a bar with a standard error.
    pub fn bar_with_error(self, label: impl Into<String>, value: f64, error: f64) -> Self {
        let error = Some(error).filter(|e| e.is_finite());
        self.push(Bar { label: label.into(), value, error, highlight: false })
    }

    /// Marks the last bar as the one the reader should see.
    pub fn highlighted(mut self) -> Self {
        if let Some(bar) = self.bars.last_mut() {
            bar.highlight = true;
        }
        self
    }

    fn push(mut self, bar: Bar) -> Self {
        self.bars.extend(Some(bar).filter(|b| b.value.is_finite()));
        self
    }
}

impl Lines {
    /// A chart without curves over the places `x`.
    pub fn new(
        title: impl Into<String>,
        x_label: impl Into<String>,
        y_label: impl Into<String>,
        x: impl IntoIterator<Item = f64>,
    ) -> Self {
        let x = x.into_iter().collect();
        Lines { title: title.into(), x_label: x_label.into(), y_label: y_label.into(), x, ..Lines::default() }
    }

    /// Adds a curve; values that are not finite interrupt it.
    pub fn series(
        mut self,
        name: impl Into<String>,
        y: impl IntoIterator<Item = impl Into<Option<f64>>>,
    ) -> Self {
        self.series.push(Series { name: name.into(), y: finite(y.into_iter().map(Into::into)) });
        self
    }

    /// Places the points by their number.
    pub fn even(mut self) -> Self {
        self.even = true;
        self
    }

    /// Vertical axis by the logarithm.
    pub fn log(mut self) -> Self {
        self.log = true;
        self
    }
}

impl Scatter {
    /// A plane without points.
    pub fn new(title: impl Into<String>, x_label: impl Into<String>, y_label: impl Into<String>) -> Self {
        Scatter {
            title: title.into(),
            x_label: x_label.into(),
            y_label: y_label.into(),
            ..Scatter::default()
        }
    }

    /// Adds a point of a kind; one that is not finite is left out.
    pub fn point(mut self, kind: impl Into<String>, label: impl Into<String>, x: f64, y: f64) -> Self {
        let point = Point { label: label.into(), kind: kind.into(), x, y, named: false };
        self.points.extend(Some(point).filter(|p| p.x.is_finite() && p.y.is_finite()));
        self
    }

    /// Writes its label beside every point; else it shows where one points.
    pub fn named(mut self) -> Self {
        self.points.iter_mut().for_each(|p| p.named = true);
        self
    }

    /// Vertical axis by the logarithm.
    pub fn log(mut self) -> Self {
        self.log = true;
        self
    }

    /// Draws the line of the points that no other beats on both axes.
    pub fn front(mut self) -> Self {
        self.front = true;
        self
    }
}

impl Strips {
    /// Strips of these columns, named `0`, `1`, ...; `unit` says what they are. Values that are not finite are left out.
    pub fn new(
        title: impl Into<String>,
        unit: impl Into<String>,
        y_label: impl Into<String>,
        columns: impl IntoIterator<Item = Vec<f64>>,
    ) -> Self {
        let clean = |values: Vec<f64>| values.into_iter().filter(|v| v.is_finite()).collect();
        let columns = columns.into_iter().map(clean).collect();
        Strips { title: title.into(), unit: unit.into(), y_label: y_label.into(), columns, log: false }
    }

    /// Vertical axis by the logarithm.
    pub fn log(mut self) -> Self {
        self.log = true;
        self
    }
}
