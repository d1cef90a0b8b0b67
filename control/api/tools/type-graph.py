#!/usr/bin/env python3
"""Writes src/types.txt (stdout) from upstream's swagger.json and the Go modules' folder (arguments): which fields each struct has, and
how lists merge. `type-graph.py .../k8s.io/kubernetes@v1.35.4/api/openapi-spec/swagger.json .../k8s.io`

A type is a line `group/version Name`; its fields follow, indented: `name shape [facts]`.
shape: s string, i int32, l int64, d double, b bool, y base64, t time, T micro time, q quantity, I int-or-string, j any JSON,
       R embedded object, `Name` or `group/version Name` a struct; `[]` before it a list, `{}` a map of it.
facts: o zero values are left out of JSON (omitempty and no pointer), w zero values are written (structs, and no omitempty), p=KEY patch merge key, p patch merge of scalars, k retainKeys, r replace, m=A,B list-map keys, u list set, a atomic.
"""
import glob, json, re, sys

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


def go_structs():
    """{(package, Name): [(json name, type, omitempty, inlined, held by value)]} of every types.go that matters."""
    structs = {}
    root = sys.argv[2]
    patterns = ["api@*/*/v[12]/types*.go", "api@*/admissionregistration/v1*/types*.go", "apimachinery@*/pkg/apis/meta/v1/types.go", "apiextensions-apiserver@*/pkg/apis/apiextensions/v1/types*.go",
                "kube-aggregator@*/pkg/apis/apiregistration/v1/types.go"]
    for path in sorted(file for pattern in patterns for file in glob.glob(root + "/" + pattern)):
        package, current = "/".join(path.split("/")[-3:-1]), None
        for line in open(path):
            if start := re.match(r"type (\w+) struct \{", line):
                current = structs.setdefault((package, start[1]), [])
            elif line.startswith("}"):
                current = None
            elif current is not None and (field := re.match(r'\t(?:\w+\s+)?([\w.*\[\]]+)\s+`.*json:"([^"]*)"', line)):
                name, *options = field[2].split(",")
                # Neither a pointer nor left out by omitzero: always there in Go.
                held = not field[1].startswith("*") and "omitzero" not in options
                current.append((name, field[1], "omitempty" in options, "inline" in options, held))
    return structs


STRUCTS = go_structs()


def held_fields(key):
    """{json name: omitempty} of the struct's fields that are no pointers."""
    found = {}
    for name, kind, omitempty, inlined, held in STRUCTS.get(key, []):
        if inlined:
            package, _, base = kind.rpartition(".")
            target = {"metav1": "meta/v1", "v1": "core/v1", "corev1": "core/v1"}.get(package, key[0])
            found |= held_fields((target, base))
        elif held:
            found[name] = omitempty
    return found


def zero_fact(shape, omitempty):
    """o, w, or nothing: lists, maps and times without omitempty are null, which is left out here."""
    if len(shape) > 1 and shape[0] not in "[{":
        return "w"
    if shape in ("q", "I"):
        return "w"
    if omitempty:
        return "o"
    return "w" if shape in ("s", "i", "l", "b", "d") else ""


def facts(prop, zero):
    out = [zero] if zero else []
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
        # Beyond what is GA, the kinds that are served though upstream has them off by default.
        served = gvk["version"] in ("v1", "v2") or gvk["kind"].startswith("MutatingAdmissionPolicy")
        if served and not gvk["kind"].endswith("List") and identity(name)[1] not in ("APIGroup", "APIResourceList", "WatchEvent", "APIVersions"):
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
    held = held_fields((package, short))
    for field, prop in sorted(definition.get("properties", {}).items()):
        form = shape(prop, package, todo)
        zero = zero_fact(form, held[field]) if field in held else ""
        rows.append(f" {field} {form}{facts(prop, zero)}")
    lines[(package, short)] = rows
for key in sorted(lines):
    print("\n".join(lines[key]))
