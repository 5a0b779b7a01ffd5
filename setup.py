"""What pyproject.toml cannot say: a wheel has the recipes of the folder beside src/, which commands find by their names."""

from pathlib import Path
from shutil import copyfile

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # a checkout has them where they are
            for source, target in self.recipes().items():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                copyfile(source, target)

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + list(self.recipes().values())

    def recipes(self):
        folder = Path(self.build_lib) / "doratune" / "recipes"
        return {str(path): str(folder / path.name) for path in sorted(Path("recipes").glob("*.yaml"))}


setup(cmdclass={"build_py": WithRecipes})
