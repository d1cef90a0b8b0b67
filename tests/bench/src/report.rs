//! What is left to read: tables in Markdown, and a picture of them.
use std::fmt::Write;

use crate::contender::Contender;
use crate::endure::Endured;
use crate::program::Programmed;
use crate::rounds::{Figures, MEASURES, Spread, ratios};

/// The figures at one number of Services.
pub struct Scale {
    pub services: u32,
    pub figures: Figures,
    /// Contender, seconds until everything was served, resident bytes, bytes of eBPF maps.
    pub agents: Vec<(Contender, f64, u64, u64)>,
}

#[derive(Default)]
pub struct Report {
    pub about: String,
    pub scales: Vec<Scale>,
    /// What was done, in words, and how long it took.
    pub programmed: Vec<(String, Programmed)>,
    pub endured: Vec<Endured>,
    /// Contender, and the times in milliseconds until its clients were freed; `None` where they were not within ten seconds.
    pub freed: Vec<(Contender, Vec<Option<f64>>)>,
}

// Writing to a String can't fail, so results of `writeln!` are left aside throughout.
impl Report {
    pub fn markdown(&self) -> String {
        let mut out = format!("# The Service path, measured\n\n{}\n", self.about);
        for scale in &self.scales {
            let _ = writeln!(out, "\n## {} Services, 4 endpoints each\n", scale.services);
            out.push_str("Median of all rounds as a share of going directly in the same round [least to greatest].\n\n");
            traffic(&mut out, scale);
            out.push_str("\n| agent | until all is served, s | resident, MiB | eBPF maps, MiB |\n|---|---|---|---|\n");
            for (contender, seconds, resident, maps) in &scale.agents {
                let _ = writeln!(out, "| {} | {seconds:.1} | {:.1} | {:.1} |", contender.name(), mebibytes(*resident), mebibytes(*maps));
            }
        }
        self.growth(&mut out);
        if !self.programmed.is_empty() {
            out.push_str("\n## Programming the kernel\n\n| what | all at once, ms | one endpoint changed, p50 ms | p99 ms | eBPF maps, MiB |\n|---|---|---|---|---|\n");
            for (what, one) in &self.programmed {
                let changes =
                    if one.change_p50_ms > 0.0 { format!("{:.2} | {:.2}", one.change_p50_ms, one.change_p99_ms) } else { "| ".into() };
                let _ = writeln!(out, "| {what} | {:.0} | {changes} | {:.1} |", one.bulk_ms, mebibytes(one.map_bytes));
            }
        }
        if !self.endured.is_empty() {
            out.push_str("\n## Established connections under load\n\n| what | times | connections | exchanges | lost | longest wait, ms |\n|---|---|---|---|---|---|\n");
            for one in &self.endured {
                let Endured { what, times, connections, exchanges, lost, longest_ms } = one;
                let _ = writeln!(out, "| {what} | {times} | {connections} | {exchanges} | {lost} | {longest_ms:.1} |");
            }
        }
        if !self.freed.is_empty() {
            out.push_str("\n## Clients of a backend that vanished without a word\n\n| by | freed after the API knew, ms | not within 10 s |\n|---|---|---|\n");
            for (contender, times) in &self.freed {
                let spread = Spread::of(times.iter().copied().flatten());
                let text = spread
                    .map_or_else(|| "never".into(), |spread| format!("{:.0} [{:.0} to {:.0}]", spread.median, spread.low, spread.high));
                let _ = writeln!(
                    out,
                    "| {} | {text} | {} of {} |",
                    contender.name(),
                    times.iter().filter(|time| time.is_none()).count(),
                    times.len()
                );
            }
        }
        out
    }

    /// The largest scale against the smallest.
    fn growth(&self, out: &mut String) {
        let [first, .., last] = &self.scales[..] else { return };
        let _ = writeln!(out, "\n## {} Services against {}\n", last.services, first.services);
        out.push_str("Share of the smaller one's median, each first taken as a share of going directly.\n\n| measure |");
        let contenders = others(first);
        for contender in &contenders {
            let _ = write!(out, " {} |", contender.name());
        }
        let _ = writeln!(out, "\n|---|{}", "---|".repeat(contenders.len()));
        for (index, measure) in MEASURES.iter().enumerate() {
            let _ = write!(out, "| {} |", measure.name);
            for contender in &contenders {
                let pair = ratios(&first.figures, index, *contender).zip(ratios(&last.figures, index, *contender));
                let _ =
                    write!(out, " {} |", pair.map_or_else(|| "-".into(), |(small, large)| format!("{:.3}", large.median / small.median)));
            }
            out.push('\n');
        }
    }

    /// Bars of medians with whiskers from least to greatest, one row of groups per scale.
    pub fn svg(&self) -> String {
        let (width, row) = (1180.0, 300.0);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
            row * self.scales.len() as f64 + 40.0
        );
        for (number, scale) in self.scales.iter().enumerate() {
            chart(&mut out, scale, number as f64 * row + 30.0, width, row);
        }
        out.push_str("</svg>\n");
        out
    }
}

fn others(scale: &Scale) -> Vec<Contender> {
    let mut all: Vec<Contender> = scale.figures.keys().map(|(_, contender)| *contender).filter(|one| *one != Contender::Direct).collect();
    all.sort();
    all.dedup();
    all
}

fn traffic(out: &mut String, scale: &Scale) {
    let contenders = others(scale);
    let _ = write!(out, "| measure | direct |");
    for contender in &contenders {
        let _ = write!(out, " {} |", contender.name());
    }
    let _ = writeln!(out, "\n|---|---|{}", "---|".repeat(contenders.len()));
    for (index, measure) in MEASURES.iter().enumerate() {
        let Some(direct) = scale.figures.get(&(index, Contender::Direct)) else { continue };
        let Some(spread) = Spread::of(direct.values.iter().copied()) else { continue };
        let _ = write!(out, "| {}, {} | {:.1} [{:.1} to {:.1}] |", measure.name, measure.unit, spread.median, spread.low, spread.high);
        for contender in &contenders {
            let Some(ratio) = ratios(&scale.figures, index, *contender) else { continue };
            let series = &scale.figures[&(index, *contender)];
            let troubles = match (series.slow, series.failed) {
                (0, 0) => String::new(),
                (slow, failed) => format!(", {slow} slow, {failed} failed"),
            };
            let _ = write!(out, " {:.3} [{:.2} to {:.2}{troubles}] |", ratio.median, ratio.low, ratio.high);
        }
        out.push('\n');
    }
}

fn chart(out: &mut String, scale: &Scale, top: f64, width: f64, row: f64) {
    const COLOURS: [&str; 5] = ["#1b7f3b", "#2f6fb3", "#b38f2f", "#8a8a8a", "#c9c9c9"];
    const HIGHEST: f64 = 1.3;
    let (left, bottom, height) = (50.0, top + row - 70.0, row - 110.0);
    let contenders = others(scale);
    let y = |ratio: f64| bottom - ratio.min(HIGHEST) / HIGHEST * height;
    let _ = writeln!(out, "<text x=\"{left}\" y=\"{top}\" font-size=\"14\">{} Services, share of going directly</text>", scale.services);
    for (place, contender) in contenders.iter().enumerate() {
        let (x, colour) = (left + 420.0 + place as f64 * 140.0, COLOURS[place % COLOURS.len()]);
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{}\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"{top}\">{}</text>",
            top - 9.0,
            x + 14.0,
            contender.name()
        );
    }
    for tick in [0.0, 0.25, 0.5, 0.75, 1.0, 1.25] {
        let stroke = if tick == 1.0 { "#444" } else { "#ddd" };
        let _ = writeln!(
            out,
            "<line x1=\"{left}\" x2=\"{width}\" y1=\"{0:.1}\" y2=\"{0:.1}\" stroke=\"{stroke}\"/><text x=\"20\" y=\"{0:.1}\">{tick}</text>",
            y(tick)
        );
    }
    let group = (width - left) / MEASURES.len() as f64;
    for (index, measure) in MEASURES.iter().enumerate() {
        let start = left + group * index as f64 + 8.0;
        let bar = (group - 16.0) / contenders.len().max(1) as f64;
        for (place, contender) in contenders.iter().enumerate() {
            let Some(ratio) = ratios(&scale.figures, index, *contender) else { continue };
            let (x, middle) = (start + bar * place as f64, start + bar * (place as f64 + 0.5));
            let (head, colour) = (y(ratio.median), COLOURS[place % COLOURS.len()]);
            let _ = writeln!(
                out,
                "<rect x=\"{x:.1}\" y=\"{head:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                bar - 2.0,
                bottom - head
            );
            let _ = writeln!(
                out,
                "<line x1=\"{middle:.1}\" x2=\"{middle:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"black\"/>",
                y(ratio.low),
                y(ratio.high)
            );
        }
        for (line, words) in measure.name.split(", ").enumerate() {
            let _ = writeln!(out, "<text x=\"{start:.1}\" y=\"{:.1}\">{words}</text>", bottom + 16.0 + 14.0 * line as f64);
        }
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounds::Series;

    #[test]
    fn tables_and_picture_show_every_contender() {
        let series = |value: f64| Series { values: vec![value; 3], slow: 0, failed: 0 };
        let figures: Figures = [((0, Contender::Direct), series(100.0)), ((0, Contender::Ebpf), series(98.0))].into();
        let scale = |services| Scale { services, figures: figures.clone(), agents: vec![(Contender::Ebpf, 1.0, 20 << 20, 2 << 20)] };
        let report = Report { scales: vec![scale(10), scale(1000)], ..Report::default() };
        let text = report.markdown();
        assert!(text.contains("| pod, connect-request-response, 1/s | 100.0 [100.0 to 100.0] | 0.980 [0.98 to 0.98] |"), "{text}");
        assert!(text.contains("| ebpf | 1.0 | 20.0 | 2.0 |") && text.contains("| pod, connect-request-response | 1.000 |"), "{text}");
        let picture = report.svg();
        assert!(picture.ends_with("</svg>\n") && picture.matches("fill=\"#1b7f3b\"").count() == 4, "{picture}");
    }
}
