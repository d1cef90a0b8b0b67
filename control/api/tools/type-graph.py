#!/usr/bin/env python3
"""Writes src/types.txt (stdout) from upstream's swagger.json (argument): which fields each struct has, and how lists merge.

A type is a line `group/version Name`; its fields follow, indented: `name shape [facts]`.
shape: s string, i int32, l int64, d double, b bool, y base64, t time, T micro time, q quantity, I int-or-string, j any JSON,
       R embedded object, `Name` or `group/version Name` a struct; `[]` before it a list, `{}` a map of it.
facts: p=KEY patch merge key, p patch merge of scalars, k retainKeys, r replace, m=A,B list-map keys, u list set, a atomic.
"""
import json, re, sys

defs = json.load(open(sys.argv[1]))["definitions"]
SCALARS = {"resource.Quantity": "q", "v1.MicroTime": "T", "v1.Time": "t", "intstr.IntOrString": "I", "v1.FieldsV1": "j",
           "runtime.RawExtension": "R", "v1.JSON": "j", "v1.JSONSchemaPropsOrArray": "j", "v1.JSONSchemaPropsOrBool": "j",
           "v1.JSONSchemaPropsOrStringArray": "j"}


def identity(name):
    """(package, Name): `core/v1 Pod`; the package's last words are enough."""
    parts = name.split(".")
    return parts[-3] + "/" + parts[-2], parts[-1]


def scalar(name):
    parts = name.split(".")
    return SCALARS.get(parts[-2] + "." + parts[-1])


def shape(prop, package, reach):
    if "$ref" in prop:
        name = prop["$ref"].removeprefix("#/definitions/")
        if scalar(name):
            return scalar(name)
        reach.append(name)
        target, short = identity(name)
        return short if target == package else target + "." + short
    kind = prop.get("type")
    if kind == "array":
        return "[]" + shape(prop["items"], package, reach)
    if kind == "object":
        extra = prop.get("additionalProperties")
        return "{}" + shape(extra, package, reach) if extra else "j"
    return {"string": {"byte": "y", "date-time": "t"}.get(prop.get("format"), "s"), "boolean": "b", "number": "d",
            "integer": "i" if prop.get("format") == "int32" else "l"}[kind]


def facts(prop):
    out = []
    strategy = prop.get("x-kubernetes-patch-strategy", "").split(",")
    if "merge" in strategy:
        key = prop.get("x-kubernetes-patch-merge-key")
        out.append("p=" + key if key else "p")
    if "retainKeys" in strategy:
        out.append("k")
    if "replace" in strategy:
        out.append("r")
    kind = prop.get("x-kubernetes-list-type") or ("atomic" if prop.get("x-kubernetes-map-type") == "atomic" else None)
    if kind == "map":
        out.append("m=" + ",".join(prop.get("x-kubernetes-list-map-keys", [])))
    elif kind in ("set", "atomic"):
        out.append({"set": "u", "atomic": "a"}[kind])
    return (" " + " ".join(out)) if out else ""


todo = []
for name, definition in defs.items():
    for gvk in definition.get("x-kubernetes-group-version-kind", []):
        if gvk["version"] in ("v1", "v2") and not gvk["kind"].endswith("List") and identity(name)[1] not in ("APIGroup", "APIResourceList", "WatchEvent", "APIVersions"):
            todo.append(name)
seen, lines = set(), {}
while todo:
    name = todo.pop()
    if name in seen:
        continue
    seen.add(name)
    package, short = identity(name)
    definition = defs[name]
    atomic = " a" if definition.get("x-kubernetes-map-type") == "atomic" else ""
    rows = [f"{package} {short}{atomic}"]
    for field, prop in sorted(definition.get("properties", {}).items()):
        rows.append(f" {field} {shape(prop, package, todo)}{facts(prop)}")
    lines[(package, short)] = rows
for key in sorted(lines):
    print("\n".join(lines[key]))
