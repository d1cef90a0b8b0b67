//! Room in an array: which elements are in use, as ranges in pieces of few sizes. Pure.
use std::collections::{BTreeMap, VecDeque};

use outrigger_abi as abi;

/// The elements that are in no range, by the size of their piece. The longest free is used first, so that a range stays as it was
/// for as long as can be.
#[derive(Debug)]
pub struct Space {
    /// The first element that was never used.
    pub top: u32,
    /// The size of the piece that a range of so many elements gets.
    piece: fn(u32) -> u32,
    free: BTreeMap<u32, VecDeque<u32>>,
}

/// 1, 2, 3, 4, 6, 8, 12, 16, … so at most a third of a piece is unused.
pub fn piece(count: u32) -> u32 {
    let power = count.next_power_of_two();
    let between = power / 4 * 3;
    if count <= between { between } else { power }
}

impl Space {
    /// Nothing is in use yet; what is before `top` never will be.
    pub fn new(top: u32, piece: fn(u32) -> u32) -> Self {
        Self { top, piece, free: BTreeMap::new() }
    }

    pub fn take(&mut self, count: u32) -> u32 {
        let piece = (self.piece)(count);
        if let Some(base) = self.reuse(piece) {
            return base;
        }
        let base = self.top;
        self.top += piece;
        base
    }

    pub fn reuse(&mut self, piece: u32) -> Option<u32> {
        let bases = self.free.get_mut(&piece)?;
        let base = bases.pop_front();
        if bases.is_empty() {
            self.free.remove(&piece);
        }
        base
    }

    pub fn free(&mut self, range: abi::Range) {
        self.free.entry((self.piece)(range.count)).or_default().push_back(range.base);
    }

    /// Takes the ranges that are in use out.
    pub fn around(mut self, mut ranges: Vec<abi::Range>) -> Self {
        ranges.sort_by_key(|range| range.base);
        for range in ranges {
            while self.top < range.base {
                // The largest piece that fits the gap.
                let gap = range.base - self.top;
                let count = (1..=gap).rev().find(|&count| (self.piece)(count) <= gap).unwrap_or(1);
                self.free(abi::Range { base: self.top, count });
                self.top += (self.piece)(count);
            }
            self.top = self.top.max(range.base.saturating_add((self.piece)(range.count)));
        }
        self
    }
}
