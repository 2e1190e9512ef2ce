"How the site shows the API: nbdev's notebook processors, with a table of docments below each signature"
import os, re
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import Parameter, Signature, formatannotation, isclass, signature
from textwrap import wrap
from typing import Union, get_args, get_origin

from fastcore.docments import docments, docstring, qual_name
from fastcore.nbio import read_nb, write_nb
from nbdev import showdoc
from nbdev.processors import FilterDefaults, _default_exp, add_links

empty = Parameter.empty

def _cell(s): return re.sub(r'\\?\|', r'\\|', ' '.join((s or '').split()))   # a bare `|` would end the cell
def _code(s): return f'`{_cell(s)}`' if s else ''
def _short(s): return re.sub(r'\b(?:[a-z_]\w*\.)+(?=[A-Z])', '', s)         # torch.nn.modules.module.Module -> Module
def _anno(o):
    "As text with room to wrap: spaces around `|`, and after commas"
    if o is empty: return ''
    if get_origin(o) is Union: return ' | '.join(map(_anno, get_args(o)))
    s = _short(o if isinstance(o, str) else formatannotation(o))
    return re.sub(r',(?=\S)', ', ', re.sub(r'\s*\|\s*', ' | ', s)).replace('NoneType', 'None')
def _default(o): return '' if o is empty else getattr(o, '__name__', None) or repr(o).replace('<factory>', '{}')   # of a dataclass: `dict`

class Bare(str):
    "Text that a signature shows without quotes"
    def __repr__(self): return str(self)

class TableRenderer:
    "A heading, the signature without its types, the docstring, and a Type/Default/Details table"
    module = None   # that the notebook exports to, where it is one of the library

    def __init__(self, sym, name=None, title_level=3):
        # Comments of a dataclass are only found in a module, not in a cell; the library has the same class.
        if self.module and is_dataclass(sym) and sym.__module__ == '__main__':
            sym = getattr(import_module(self.module), sym.__name__)
        self.is_prop,self.title_level = isinstance(sym, property),title_level
        self.sym = sym.fget if self.is_prop else sym
        self.nm = name or qual_name(self.sym)

    def _signature(self):
        if self.is_prop: return self.nm
        ps = [p.replace(annotation=empty, default=empty if p.default is empty else Bare(_default(p.default)))
              for p in signature(self.sym).parameters.values() if p.name != 'self']
        indent = ' '*(len(self.nm) + 1)
        return '\n'.join(wrap(f'{self.nm}{Signature(ps)}', 88, subsequent_indent=indent, break_long_words=False))

    def _bases(self): return [o for o in getattr(self.sym, '__mro__', ())[1:] if is_dataclass(o)]

    def _inherited(self):
        "Names of the fields that a dataclass has from others, which are listed there"
        own = getattr(self.sym, '__annotations__', {})
        return {f.name for o in self._bases() for f in fields(o)} - {*own}

    def _type(self, k, v):
        "Data comes in many forms, which have one name (see the glossary); a default of None is no type"
        if k == 'data' and v.anno in (empty, type(None)): return 'Data | None' if v.default is None else 'Data'
        return '' if v.anno is type(None) else _anno(v.anno)

    def _rows(self):
        above = self._inherited()
        for k,v in docments(self.sym, full=True).items():
            if k in above: continue
            typ,dflt,doc = self._type(k, v), _default(v.default), _cell(v.docment)
            star = {Parameter.VAR_POSITIONAL: '*', Parameter.VAR_KEYWORD: '**'}.get(v.get('kind'), '')
            if k == 'return' and (isclass(self.sym) or not doc and typ in ('', 'None')): continue
            if k == 'self' or star and not (typ or doc): continue
            yield '**Returns**' if k == 'return' else _code(star + k), _code(typ), _code(dflt), doc

    def _table(self):
        rows = [*self._rows()]
        if [r[0] for r in rows] == ['**Returns**']: return ' '.join(filter(None, rows[0]))
        cols = [*zip(('', 'Type', 'Default', 'Details'), ('---',)*4, *rows)]
        cols = [c for i,c in enumerate(cols) if i == 0 or any(c[2:])]
        return '\n'.join(f"| {' | '.join(r)} |" for r in zip(*cols)) if len(cols) > 1 else ''

    def _repr_markdown_(self):
        last = self.nm.split('.')[-1]
        # A plain `__repr__` needs no entry, nor do the events of a callback, which fastai calls.
        if self.nm[0] == '_' or last[0] == '_' and not self.sym.__doc__ or last.startswith(('before_', 'after_')): return ''
        head,sig = '#'*self.title_level + f' `{self.nm}`', f'```python\n{self._signature()}\n```'
        more = f"Fields, after those of {' and '.join(f'`{o.__name__}`' for o in self._bases())}:" if self._inherited() else ''
        return '\n\n'.join(o for o in (head, sig, docstring(self.sym), more, self._table()) if o)

class SiteProcs(FilterDefaults):
    "nbdev's processors; `nbdev_sphinx` links names in backticks, needing neither an installed package nor a host"
    def base_procs(self): return [o for o in super().base_procs() if o is not add_links]

def process(paths):
    "Write the first notebook of `paths` to the second: exported cells hidden, API entries in their place"
    src,dst = paths
    os.environ['IN_TEST'] = '1'   # as nbdev does: exporting from a notebook must not happen while its cells run here
    nb = read_nb(src)
    module = nb.metadata['module'] = f'fasterai.{exp}' if (exp := _default_exp(nb)) else None
    # Set here, not by the `renderer` key of pyproject.toml: then only the docs build has to import this file.
    showdoc.BasicMarkdownRenderer,TableRenderer.module = TableRenderer,module
    SiteProcs()(nb)
    write_nb(nb, dst)
