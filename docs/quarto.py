"What nbdev's notebooks borrow from Quarto, in text: callouts, links between pages, cell options, stored outputs"
import re

_re_fence = re.compile(r'(^(`{3,}|~{3,}).*?^\2[`~]*[ \t]*$|`+[^`\n]+?`+)', re.MULTILINE | re.DOTALL)
_re_callout = re.compile(r'^(:{3,})[ \t]*\{\.callout-(note|tip|warning|important|caution)[ \t]*([^}\n]*)\}[ \t]*\n'
                         r'(.*?)^\1[ \t]*$', re.MULTILINE | re.DOTALL)
_re_div = re.compile(r'^:{3,}[ \t]*\S.*$', re.MULTILINE)
_re_link = re.compile(r'(\]\()(?!/)([^()\s:#]+?)\.(?:html|ipynb)(#[^()\s]+)?(\))')
_re_option = re.compile(r'^#\|[ \t]*(.*?)[ \t]*(?:\n|\Z)', re.MULTILINE)
_re_hide_line = re.compile(r'^.*#\|[ \t]*hide_line[ \t]*$\n?', re.MULTILINE)
_re_ansi = re.compile(r'\x1B(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])')
_re_warn = re.compile(r'^\S+:\d+: (\w+Warning: .*)\n(?:  .*\n?)?', re.MULTILINE)

def text(o): return ''.join(o or '')   # a notebook stores text as one string or as a list of lines

def outside_code(f, s):
    "Apply `f` to the parts of the markdown `s` that are neither a fenced block nor a code span"
    pos,res = 0,[]
    for m in _re_fence.finditer(s):
        res += [f(s[pos:m.start()]), m[0]]
        pos = m.end()
    return ''.join(res) + f(s[pos:])

def callouts(s, f):
    "Replace each `::: {.callout-kind}` block by `f(kind, title, body)`; any other fenced div is an error"
    def _f(m):
        kind,attrs,body = m.groups()[1:]
        title = re.search(r'title="(.*?)"', attrs)
        head = None if title else re.match(r'\s*#+[ \t]+(.+)\n', body)   # Quarto takes a heading at the top as the title
        if head: body = body[head.end():]
        return f(kind, (title or head)[1] if title or head else '', body.strip('\n'))
    left = _re_div.search(_re_fence.sub('', _re_callout.sub('', s)))
    if left: raise ValueError(f'only callouts are known, closed in the same cell, got {left[0]!r}')
    return _re_callout.sub(_f, s)

def links(s, f):
    "Replace the target of each relative link to a page or notebook by `f(path without suffix, anchor)`"
    return outside_code(lambda t: _re_link.sub(lambda m: m[1] + f(m[2], m[3] or '') + m[4], t), s)

def options(s):
    "The directives at the top of a code cell as a dict, and its code without them and without hidden lines"
    opts,pos = {},0
    while m := _re_option.match(s, pos):
        k,_,v = m[1].partition(':') if ':' in m[1] else m[1].partition(' ')
        opts[k.strip()],pos = v.strip().strip('"\''),m.end()
    return opts, _re_hide_line.sub('', s[pos:]).strip('\n')

def plain(s):
    "Text as a terminal shows it in the end: no colours, carriage returns carried out (progress bars wipe themselves out)"
    def _line(l):
        res = ''
        for o in l.split('\r'): res = o + res[len(o):]
        return res.rstrip()
    return '\n'.join(map(_line, _re_ansi.sub('', s).replace('\r\n', '\n').split('\n'))).strip('\n')

def warning(m):
    "A warning without its path and line of code; nothing for those meant for developers of other libraries"
    return '' if m[1].startswith(('FutureWarning', 'DeprecationWarning')) else m[1] + '\n'

def clean(o):
    "The output `o` fit for a page, None where nothing is left of it"
    if o['output_type'] == 'stream':
        o['text'] = plain(_re_warn.sub(warning, text(o['text'])))
        return o if o['text'].strip() else None
    if o['output_type'] == 'error': return o | dict(traceback=[_re_ansi.sub('', t) for t in o['traceback']])
    d = o['data']
    html = text(d.get('text/html'))
    if '<progress' in html or 'progress::-webkit' in html:           # fastprogress: its styles, and bars that never end
        html = re.sub(r'<style>.*?</style>|<div>\s*<progress.*?</div>', '', html, flags=re.DOTALL)
        if '<table' not in html: return None
        d['text/html'] = html
    if 'text/plain' in d: d['text/plain'] = plain(text(d['text/plain']))
    d.pop('application/vnd.jupyter.widget-view+json', None)          # needs a running kernel
    return o if d else None
