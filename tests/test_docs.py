"What the site makes of the API and of the notebooks"
import ast, json, re, sys
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import dirname, join, normpath
from types import SimpleNamespace
from typing import Literal
import pytest
import yaml

root = Path(__file__).parent.parent
sys.path.append(str(root/'docs'))
pytest.importorskip('sphinx')

import source
from nbdev.doclinks import nbglob
from nbdev_sphinx import convert, groups, pages, slug
from quarto import links, options, text
from showdoc import TableRenderer
from fasterai.lowrank.plan import DecompositionPlan, LayerPlan
from fasterai.lowrank.ranks import Layer
from fasterai.misc.fc_decomposer import FC_Decomposer

def table(sym):
    "First column -> the others, of the table that the site shows for `sym`"
    rows = [re.split(r'(?<!\\)\|', l)[1:-1] for l in TableRenderer(sym)._repr_markdown_().splitlines() if l.startswith('|')]
    return {r[0].strip(' `'): [o.strip() for o in r[1:]] for r in rows[2:]}

def test_data_has_a_type():
    assert table(FC_Decomposer.plan)['data'][:2] == [r'`Data \| None`', '`None`']

def test_types_have_room_to_wrap():
    def f(
        mode: bool|Literal['auto','full','diag']='auto', # how
        x=None,                                          # no type is known
    ): ...
    rows = table(f)
    assert rows['mode'][0] == r"`bool \| Literal['auto', 'full', 'diag']`"
    assert rows['x'] == ['', '`None`', 'no type is known']

def test_inherited_fields_are_listed_with_their_class():
    own,inherited = table(LayerPlan),table(Layer)
    assert {'rank', 'reason'} <= own.keys() and {'in_features', 'spectrum'} <= inherited.keys()
    assert not own.keys() & inherited.keys()
    assert 'those of `Layer`' in TableRenderer(LayerPlan)._repr_markdown_()
    assert 'those of' not in TableRenderer(Layer)._repr_markdown_()

def test_a_field_declared_again_is_listed_again():
    @dataclass
    class Base:
        a: int = 0
        b: int = 1
    @dataclass
    class Sub(Base):
        b: float = 2.
        c: dict = field(default_factory=dict)
    rows = table(Sub)
    assert [*rows] == ['b', 'c'] and rows['b'][1] == '`2.0`' and rows['c'][1] == '`{}`'

def test_a_lone_return_needs_no_table():
    md = TableRenderer(DecompositionPlan.to_frame)._repr_markdown_()
    assert '**Returns** `DataFrame`' in md and '| Type |' not in md

def test_an_entry_is_shown_once():
    entry = dict(cell_type='code', source='show_doc(f)', outputs=[dict(output_type='display_data', data={'text/markdown': '### `f`'})])
    env = SimpleNamespace(domaindata={}, found_docs=set())
    cells = convert(dict(metadata={}, cells=[entry, dict(entry)]), 'page', env)
    assert [c['source'] for c in cells] == ['### `f`'] and env.domaindata['fasterai']['f'] == 'page'

@pytest.mark.parametrize('path', source.modules(root/'fasterai'), ids=lambda p: p.stem)
def test_source_pages_hold_all_the_code(path):
    blocks = source.cells(path)
    code = ast.parse('\n'.join(c for c,_ in blocks)).body
    whole = ast.parse(path.read_text(encoding='utf-8')).body[1:]     # but for the docstring and `__all__`
    assert [*map(ast.dump, code)] == [ast.dump(o) for o in whole if not ast.unparse(o).startswith('__all__ =')]
    names = [n for _,ns in blocks for n in ns]
    md = source.page(path, 'fasterai.x.y')
    assert all(f'id="{n}"' in md for n in names)

def test_methods_have_a_source():
    assert {'LayerPlan', 'LayerPlan.error', 'DecompositionPlan.apply', 'to_dense'} <= source.defined(root/'fasterai/lowrank/plan.py')

def sidebar(): return yaml.safe_load((root/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']

def test_the_sidebar_lists_each_notebook_once():
    there = [o.relative_to(root/'nbs').with_suffix('').as_posix() for o in nbglob(root/'nbs', as_path=True)]
    assert sorted(pages(sidebar())) == sorted(there)
    assert [c for c,_ in groups(sidebar())] == ['', 'Start here', 'Guides', 'Reference: low rank', 'Reference: folding', 'Reference: pruning',
        'Reference: sparsity', 'Reference: quantization', 'Reference: export', 'Reference: workflow', 'Reference: all methods', 'Internals']

def test_links_to_the_glossary_have_a_target():
    terms = {slug(l[3:]) for l in nb_markdown(root/'nbs/glossary.ipynb').splitlines() if l.startswith('## ')}
    links = {(p.stem, a) for p in nbglob(root/'nbs', as_path=True) for a in re.findall(r'glossary\.html#([\w-]+)', nb_markdown(p))}
    assert len(links) > 5 and {a for _,a in links} <= terms

def nb_markdown(p):
    from fastcore.nbio import read_nb
    return '\n'.join(c.source for c in read_nb(p).cells if c.cell_type == 'markdown')

# What the pages show

def cells(page): return json.loads((root/'nbs'/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']
listed = pages(sidebar())
lessons = ['index'] + [p for p in listed if p.startswith('tutorials/')]

def test_titles_differ():
    titles = [text(cells(p)[0]['source']).splitlines()[0].strip('# ').lower().rstrip('s') for p in listed]
    assert sorted(titles) == sorted({*titles})

@pytest.mark.parametrize('page', listed)
def test_links_lead_to_pages(page):
    src = '\n'.join(text(c['source']) for c in cells(page) if c['cell_type'] == 'markdown')
    to = []
    links(src, lambda path, anchor: to.append(normpath(join(dirname(page), path))) or '')
    assert {*to} <= {*listed}

@pytest.mark.parametrize('page', lessons)
def test_code_fits_the_column(page):
    "Longer lines scroll sideways"
    code = [options(text(c['source'])) for c in cells(page) if c['cell_type'] == 'code']
    md = '\n'.join(text(c['source']) for c in cells(page) if c['cell_type'] == 'markdown')
    blocks = [m[2] for m in re.finditer(r'^```(python|sh)\n(.*?)^```', md, re.M | re.S)]
    lines = '\n'.join([s for o,s in code if 'hide' not in o] + blocks).splitlines()
    assert len(lines) > 10 and [l for l in lines if len(l) > 100] == []


@pytest.mark.parametrize('page', lessons)
def test_what_a_cell_shows_is_stored(page):
    "A page shows the output that its last run stored: without one, the text around it speaks of nothing"
    def shows(code):
        last = ast.parse(code).body[-1]
        if not isinstance(last, ast.Expr): return False
        return not isinstance(last.value, ast.Call) or ast.unparse(last.value.func).split('.')[-1] in ('DataFrame', 'plot', 'plot_tradeoff', 'round', 'set_index')
    code = [(*options(text(c['source'])), c['outputs']) for c in cells(page) if c['cell_type'] == 'code']
    assert [s for o,s,outs in code if 'hide' not in o and s and shows(s) and not outs] == []
