"Sphinx settings; run by `docs/build.py`"
import sys
from pathlib import Path

import yaml
from nbdev.config import read_version

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'docs'))

project,author = 'fasterai','fasterai contributors'
version = release = read_version(root/'fasterai')
html_title = f'{project} {version}'
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.mathjax', 'sphinx-mathjax-offline', 'sphinx.ext.githubpages',
              'nbdev_sphinx']
nbdev_sidebar = yaml.safe_load((root/'nbs'/'sidebar.yml').read_text())['website']['sidebar']['contents']

# Notebooks are read, never run; what they show is what their last run stored.
nb_execution_mode = 'off'
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_render_markdown_format = 'myst'
exclude_patterns = ['.*']

# Markdown as pandoc reads it: Quarto's maths and callouts, none of MyST's own syntax that could swallow a line of text.
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'strikethrough']
myst_disable_syntax = ['myst_line_comment', 'myst_block_break', 'myst_target', 'myst_role']
myst_dmath_allow_space = False
myst_dmath_allow_digits = False
myst_heading_anchors = 6
myst_heading_slug_func = 'nbdev_sphinx.slug'
nitpicky = True
smartquotes = False
suppress_warnings = ['myst.header', 'myst.strikethrough']   # an API entry is a level-3 heading wherever it stands

html_theme = 'furo'
html_static_path = ['site.css']
html_css_files = ['site.css']
html_use_index = html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False
html_theme_options = dict(navigation_with_keys=True)
pygments_style,pygments_dark_style = 'friendly','github-dark'
copybutton_exclude = '.linenos, .gp, .go'
