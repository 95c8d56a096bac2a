"""benchmarks/size.py: what it reads in a build and in nm's listing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import size
from rich.console import Console


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("main", "main"),
        ("void rnn_ext::cpu::avx2::(anonymous namespace)::run_tile<6, 4, X<(int)3> >(float*, X<2>)", "avx2::run_tile"),
        ("a::B<int>::~B()", "a::B::~B"),
        ("std::pair<int, float> a::f<a::g<1>::operator()(int) const::{lambda(int)#1}>(int) [clone .isra.0]", "a::f"),
        ("a::f(int)::{lambda(auto:1&)#2}::operator()<int>(int&) const", "a::f::{lambda#2}::operator"),
        ("bool operator< <int>(a::B<int> const&)", "operator"),
    ],
)  # fmt: skip
def test_template_of(name, template):
    assert size.template_of(name) == template


def test_objects_of_a_build():
    text = "rule compile\nbuild /a$ b/x.o: compile /src/x.cpp\nbuild /a$ b/C$:.o: compile /c\nbuild /l.so: link /x.o\n"
    assert size.objects_of(text) == [Path("/a b/x.o"), Path("/a b/C:.o")]


def test_tables_add_up():
    listing = (
        "0000 0010 t f<int>(int)\n"
        "0000 0020 W f<float>(float)\n"
        "0000 0040 T g()\n"
        "0000 0100 r a_constant\n"
        "0000 0100 d a_variable\n"
    )
    first = size.Size("kernels_avx512", 100.4, size.read(listing))
    second = size.Size("dispatch", None, size.read("0000 0004 T rnn_ext::cpu::avx512::f()\n"))
    assert (first.functions, first.text) == (3, 0x70)
    console = Console(width=80, record=True, file=io.StringIO())
    for table in size.tables([second, first], 1):
        console.print(table)
    words = [line.split() for line in console.export_text().replace("│", " ").replace("┃", " ").splitlines()]
    assert ["kernels_avx512", "100", "0", "3"] in words
    assert ["dispatch", "?", "0", "1"] in words
    assert ["all", "100", "0", "4"] in words
    assert ["g", "0", "1"] in words and not any(row[:1] == ["f"] for row in words)
