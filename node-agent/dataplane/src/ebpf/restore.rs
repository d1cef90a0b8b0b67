//! Reads the maps that a former agent left back into a layout.
use super::maps::Tables;
use super::plan::Layout;
use crate::backend::Result;

pub fn read(tables: &Tables) -> Result<Layout> {
    let frontends = tables.frontends.entries()?;
    if frontends.is_empty() {
        return Ok(Layout::default());
    }
    let slots = tables.slots.entries()?;
    Ok(Layout::adopt(frontends, |index| slots.get(index as usize).filter(|slot| slot.service != 0).copied()))
}
