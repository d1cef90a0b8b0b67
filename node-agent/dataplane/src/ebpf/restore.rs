//! Reads the maps that a former agent left back into a layout.
use std::collections::HashMap;

use outrigger_abi as abi;

use super::maps::Tables;
use super::plan::Layout;
use crate::backend::Result;

pub fn read(tables: &Tables) -> Result<Layout> {
    let frontends = tables.frontends.entries()?;
    if frontends.is_empty() {
        return Ok(Layout::default());
    }
    let slots: HashMap<u32, abi::Slot> = tables.slots.entries()?.into_iter().filter(|(_, slot)| slot.service != 0).collect();
    Ok(Layout::adopt(frontends, |index| slots.get(&index).copied()))
}
