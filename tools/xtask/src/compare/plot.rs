//! The plot: for each case a bar a system, as long as its share of the longest.

use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::*;

use super::results::Results;

const ROW: i32 = 13;
const GAP: i32 = 10;
const LEFT: i32 = 220;
const BAR: i32 = 520;
const TEXT: i32 = 11;

/// Writes the plot.
pub(super) fn write(results: &Results, file: &Path) -> anyhow::Result<()> {
    let systems = results.systems();
    let height: i32 = results
        .rows
        .iter()
        .map(|row| GAP + ROW * systems.iter().filter(|&&system| row.median(system).is_some()).count() as i32)
        .sum();
    let area = SVGBackend::new(file, ((LEFT + BAR + 160) as u32, (height + 2 * GAP) as u32)).into_drawing_area();
    let failed = |error| anyhow!("cannot draw {}: {error}", file.display());
    area.fill(&WHITE).map_err(|error| failed(error.to_string()))?;
    let text = ("sans-serif", TEXT).into_font();
    let mut y = GAP;
    for row in &results.rows {
        let values: Vec<_> = systems.iter().filter_map(|&system| Some((system, row.median(system)?))).collect();
        let longest = values.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let title = format!("{} ({})", row.name, row.unit);
        area.draw(&Text::new(title, (4, y), text.clone())).map_err(|error| failed(error.to_string()))?;
        for (system, value) in values {
            let length = (value / longest * f64::from(BAR)) as i32;
            let color = Palette99::pick(system as usize).mix(if system.is_ours() { 1.0 } else { 0.45 });
            let bar = Rectangle::new([(LEFT, y), (LEFT + length.max(1), y + ROW - 2)], color.filled());
            area.draw(&bar).map_err(|error| failed(error.to_string()))?;
            let label = format!("{} {value:.3}", system.name());
            area.draw(&Text::new(label, (LEFT + length + 4, y), text.clone()))
                .map_err(|error| failed(error.to_string()))?;
            y += ROW;
        }
        y += GAP;
    }
    area.present().map_err(|error| failed(error.to_string()))
}
