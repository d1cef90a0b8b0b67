//! `quantity('1Gi')` and what can be asked of it.
use outrigger_cel::{Error, Library, Opaque, Value};

use crate::quantity::Quantity;

#[derive(Debug)]
struct Amount(Quantity);

impl Opaque for Amount {
    fn type_name(&self) -> &'static str {
        "kubernetes.Quantity"
    }

    fn equals(&self, other: &dyn Opaque) -> bool {
        other.downcast::<Amount>().is_some_and(|other| other.0 == self.0)
    }
}

pub const QUANTITIES: Library = &[
    ("quantity(string) -> kubernetes.Quantity", |a| {
        Quantity::parse(a[0].as_str().unwrap_or_default()).map(|quantity| Value::opaque(Amount(quantity))).map_err(Error::new)
    }),
    ("isQuantity(string) -> bool", |a| Ok(Quantity::parse(a[0].as_str().unwrap_or_default()).is_ok().into())),
    ("kubernetes.Quantity.isGreaterThan(kubernetes.Quantity) -> bool", |a| Ok((of(&a[0])? > of(&a[1])?).into())),
    ("kubernetes.Quantity.isLessThan(kubernetes.Quantity) -> bool", |a| Ok((of(&a[0])? < of(&a[1])?).into())),
    ("kubernetes.Quantity.compareTo(kubernetes.Quantity) -> int", |a| Ok(Value::Int(of(&a[0])?.cmp(&of(&a[1])?) as i64))),
    ("kubernetes.Quantity.add(kubernetes.Quantity) -> kubernetes.Quantity", |a| Ok(Value::opaque(Amount(of(&a[0])? + of(&a[1])?)))),
    ("kubernetes.Quantity.add(int) -> kubernetes.Quantity", |a| Ok(Value::opaque(Amount(of(&a[0])? + units(&a[1]))))),
    ("kubernetes.Quantity.sub(kubernetes.Quantity) -> kubernetes.Quantity", |a| Ok(Value::opaque(Amount(of(&a[0])? - of(&a[1])?)))),
    ("kubernetes.Quantity.sub(int) -> kubernetes.Quantity", |a| Ok(Value::opaque(Amount(of(&a[0])? - units(&a[1]))))),
    ("kubernetes.Quantity.sign() -> int", |a| {
        let quantity = of(&a[0])?;
        Ok(Value::Int(if quantity.is_zero() {
            0
        } else if quantity.is_negative() {
            -1
        } else {
            1
        }))
    }),
    ("kubernetes.Quantity.isInteger() -> bool", |a| Ok(of(&a[0])?.is_integer().into())),
    ("kubernetes.Quantity.asInteger() -> int", |a| {
        let quantity = of(&a[0])?;
        if quantity.is_integer() { Ok(Value::Int(quantity.value())) } else { Err(Error::new("cannot convert value to integer")) }
    }),
    ("kubernetes.Quantity.asApproximateFloat() -> double", |a| Ok(Value::Double(of(&a[0])?.millis() as f64 / 1000.0))),
];

fn of(value: &Value) -> Result<Quantity, Error> {
    value.downcast::<Amount>().map(|amount| amount.0).ok_or_else(Error::no_overload)
}

fn units(value: &Value) -> Quantity {
    match value {
        Value::Int(units) => Quantity::from_units(*units),
        _ => Quantity::from_units(0),
    }
}
