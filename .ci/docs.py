"Builds the site into _docs: by Quarto where it is installed, elsewhere by smalldocs, which reads the same project files"
import re, shutil, subprocess, sys
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

def existing(item, root):
    "The part of a navigation entry whose pages exist; `*` is written out"
    if isinstance(item, list): return [o for i in item for o in existing(i, root)]
    if isinstance(item, str): return [str(p.relative_to(root)) for p in sorted(root.glob(item))]
    if 'contents' not in item: return [item] if (root/item['href']).is_file() else []
    contents = existing(item['contents'], root)
    return [item | {'contents': contents}] if contents else []

def trim_navigation(root):
    "Leave out of navbar and sidebar what is not there to link to"
    for name, bar, key in (('_quarto.yml', 'navbar', 'left'), ('sidebar.yml', 'sidebar', 'contents')):
        cfg = yaml.safe_load((root/name).read_text())
        part = cfg['website'][bar]
        part[key] = existing(part[key], root)
        (root/name).write_text(yaml.safe_dump(cfg, sort_keys=False))

def final_names(root):
    "Give pages their names on the site, 00_countdown.ipynb -> countdown.ipynb, and point links and pictures there"
    pages = [*root.rglob('*.ipynb')]
    for p in [*pages, *root.glob('*.yml')]:
        text = re.sub(r'\b\d\d[a-z]?_(\w+\.ipynb)', r'\1', p.read_text(encoding='utf-8'))
        text = re.sub(r'output-file: [\w.-]+', '', text).replace('../figures/', 'figures/')
        p.write_text(text, encoding='utf-8')
    for p in pages: p.rename(p.with_name(re.sub(r'^\d\d[a-z]?_', '', p.name)))

def main():
    root = Path(__file__).resolve().parent.parent
    refresh_quarto_yml()
    shutil.rmtree(root/'_proc', ignore_errors=True)
    proc = proc_nbs(n_workers=2, force=True)
    if (root/'figures').is_dir():
        shutil.copytree(root/'figures', proc/'figures', dirs_exist_ok=True, ignore=shutil.ignore_patterns('*.ipynb'))
    trim_navigation(proc)
    final_names(proc)
    tool = shutil.which('quarto') or str(Path(sys.executable).parent/'smalldocs')
    subprocess.run([tool, 'render'], cwd=proc, check=True)
    out = get_config().doc_path
    shutil.rmtree(out, ignore_errors=True)
    (proc/out.name).rename(out)
    print(f'{out.relative_to(root)}/index.html')

if __name__ == '__main__': main()
