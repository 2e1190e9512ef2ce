"Package metadata, read from settings.ini; the version is the one in fasterai/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

root = Path(__file__).parent
cfg = ConfigParser()
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
version = re.search(r'^__version__\s*=\s*"([^"]+)"', (root/'fasterai/__init__.py').read_text(), re.M)[1]

setup(
    name=cfg['lib_name'], version=version, description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], license=cfg['license'], python_requires=f">={cfg['min_python']}",
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['fasterai', 'fasterai.*']),
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': f"{cfg['dev_requirements']} {cfg['onnx_requirements']}".split(), 'onnx': cfg['onnx_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['fasterai=fasterai._modidx:d']},
    classifiers=['Intended Audience :: Developers', 'Natural Language :: English', 'Operating System :: OS Independent']
        + [f'Programming Language :: Python :: 3.{v}' for v in (11, 12, 13)],
    zip_safe=False)
