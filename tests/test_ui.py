"""The page, without a browser: what it asks the service, what it shows of the answers, and what it says when there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ui_server
from fake_backends import Fake
from streamlit.testing.v1 import AppTest
from ui_server import chart_of, example, fakes, jpeg, xray

from contracts.errors import RowError
from contracts.pages import NOT_FOR_DIAGNOSIS
from serve.messages import Loaded, SearchRequest
from serve.security import new_key
from serve.ui import run as start
from serve.ui.client import Api
from serve.ui.given import more

UI = Path(start.__file__).parent


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> tuple[Path, str]:
    """(the file, a key in it)"""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return file, new_key(file, "page")


@pytest.fixture(scope="module")
def running(keys) -> Iterator[tuple[str, str, Fake]]:
    fusion = fakes()["fusion"]
    with ui_server.service(keys[0], fusion=fusion) as address:
        yield address, keys[1], fusion


@pytest.fixture
def service(running) -> tuple[str, str, Fake]:
    """(address, key, the fake that classifies, not asked yet)"""
    running[2].classify.asked.clear()
    return running


@pytest.fixture
def page(service, monkeypatch) -> AppTest:
    """The script as Streamlit runs it, with its first view."""
    monkeypatch.setenv("CXRAY_API", service[0])
    monkeypatch.setenv("CXRAY_API_KEY", service[1])
    return AppTest.from_file(str(UI / "page.py"), default_timeout=30).run()


def view(name: str, address: str, key: str) -> AppTest:
    lines = f"from serve.ui.client import Api\nfrom serve.ui.views import {name}\n{name}.show(Api({address!r}, {key!r}))"
    return AppTest.from_string(lines, default_timeout=30).run()


def html(page: AppTest) -> str:
    assert not page.exception
    return "\n".join(part.proto.body for part in page.get("html"))


def press(page: AppTest, label: str) -> str:
    (button,) = [one for one in page.button if one.label == label]
    return html(button.click().run())


def test_every_call_is_one_that_the_gateway_takes(service):
    address, key, _ = service
    api = Api(address, key)
    assert [m.name for m in api.models().models] == ["fusion", "search"]
    assert [e.id for e in api.examples().examples] == ["1", "2"] and api.example("1").labels["Edema"] == 1
    assert len(api.search(SearchRequest(text="effusion", pictures=True)).matches) == 6
    for images, chart in (([jpeg(xray())], None), ([], {"age": 3.0}), ([jpeg(xray())] * 2, {"age": 3.0})):
        said, seconds = api.classify(images, chart)
        assert said.images == len(images) and ("chart" in said.read) == (chart is not None) and seconds > 0


def test_a_demo_study_s_chart_goes_to_the_model_as_it_is(page, service):
    shown = press(page, "Classify")
    (encoded, _, evidence, overlay, knowledge) = asked = service[2].classify.asked[-1]
    assert chart_of(asked) == example("1").chart and len(encoded) == 1 and evidence and overlay and knowledge
    assert NOT_FOR_DIAGNOSIS in shown and "complains of Dyspnea" in shown and "Source: our own" in shown and "stated" in shown
    assert "IMPRESSION" in shown and "opacity:0.70" in shown


def test_what_is_changed_on_the_form_is_changed_in_the_chart_and_nothing_else(page, service):
    (heart,) = [one for one in page.number_input if one.label.startswith("Heart rate")]
    heart.set_value(55.0)
    (medicines,) = page.text_area
    medicines.set_value("furosemide\nmetformin\n")
    press(page, "Classify")
    expected = example("1").chart
    expected["triage"]["heartrate"] = 55.0
    expected["medicines"].append({"name": "metformin"})
    assert chart_of(service[2].classify.asked[-1]) == expected


def test_the_model_reads_only_what_it_is_given(page, service):
    for box in page.checkbox:
        box.uncheck()
    press(page, "Classify")
    assert service[2].classify.asked[-1][1] is None and service[2].classify.asked[-1][4] is False


def test_another_study_brings_its_own_chart(page, service):
    page.selectbox(key="example").set_value("2").run()
    assert all(one.value is None for one in page.number_input), "of the second nothing is known"
    assert press(page, "Classify").count('class="layers"') == 4  # both images, chosen and answered
    assert service[2].classify.asked[-1][1] is None


def test_an_answer_stays_when_something_else_is_clicked_and_goes_with_a_failure(page, service, monkeypatch):
    press(page, "Classify")
    assert "cx truth" in html(page.checkbox[0].uncheck().run())
    monkeypatch.setattr(service[2].classify, "run", lambda *_: RowError("nothing_to_read", "the model reads image"))
    shown = press(page, "Classify")
    assert "the model reads image" in shown.lower() and "cx truth" not in shown


def test_own_images_without_any_and_without_a_chart_are_nothing(page, service):
    page.radio(key="source").set_value("Your own images").run()
    press(page, "Classify")
    assert "nothing to look at yet" in page.info[0].value and not service[2].classify.asked


def test_another_patient_s_images_do_not_go_with_the_chart_and_the_answer_of_the_last_one(page, service):
    def put(*seeds: int) -> str:
        page.file_uploader(key="files").set_value([("x.jpg", jpeg(xray(n)), "image/jpeg") for n in seeds])
        return html(page.run())

    def age(page: AppTest):
        (found,) = [one for one in page.number_input if one.label.startswith("Age")]
        return found

    page.radio(key="source").set_value("Your own images").run()
    put(0)
    age(page).set_value(50.0)
    assert "cx findings" in press(page, "Classify") and chart_of(service[2].classify.asked[-1]) == {"age": 50.0}
    assert "cx findings" not in put(0, 1) and age(page).value == 50.0, "a further image of the same study"
    assert "cx findings" in press(page, "Classify") and len(service[2].classify.asked[-1][0]) == 2
    assert "cx findings" not in put(2) and age(page).value is None
    press(page, "Classify")
    assert service[2].classify.asked[-1][1] is None and len(service[2].classify.asked[-1][0]) == 1


def test_images_that_come_after_an_answer_are_another_patient_s():
    assert more([], [b"a"], answered=False) and not more([], [b"a"], answered=True)
    assert more([b"a"], [b"a", b"b"], answered=True) and not more([b"a", b"b"], [b"b"], answered=False)


def test_what_is_out_of_range_is_said(page, service):
    (temperature,) = [one for one in page.number_input if one.label.startswith("Temperature")]
    temperature.set_value(37.0)
    press(page, "Classify")
    assert "Mended: triage.temperature." in [one.value for one in page.caption]
    assert service[2].classify.asked[-1][1]["triage"]["temperature"] == 98.6, "by the same code as the service"


def test_a_wrong_key_is_told_in_one_box(service, monkeypatch):
    monkeypatch.setenv("CXRAY_API", service[0])
    monkeypatch.setenv("CXRAY_API_KEY", "wrong")
    page = AppTest.from_file(str(UI / "page.py"), default_timeout=30).run()
    shown = html(page)
    assert "Unauthorized" in shown and "Request " in shown and "wrong" not in shown and not page.button
    shown = html(page.text_input(key="key").set_value(service[1]).run())
    assert "Unauthorized" not in shown and page.button, "a key that is typed in comes before that of the environment"


def test_a_service_that_is_gone_is_a_sentence(monkeypatch):
    monkeypatch.setenv("CXRAY_API", f"http://127.0.0.1:{ui_server.free_port()}")
    shown = html(AppTest.from_file(str(UI / "page.py"), default_timeout=30).run())
    assert "The service does not answer" in shown and NOT_FOR_DIAGNOSIS in shown


def test_compare_switches_one_thing(service):
    address, key, fusion = service
    page = view("compare", address, key)
    shown = press(page, "Compare")
    warm, a, b = fusion.classify.asked  # what is new costs more the first time: that is no side's
    assert chart_of(warm) == chart_of(b)
    assert (chart_of(a), a[-1], b[-1]) == (None, True, True) and chart_of(b) == example("1").chart
    assert "becomes positive" in shown and "▲ +0.50" in shown and shown.count(" ms<") == 2
    page.radio(key="switch").set_value("Knowledge").run()
    shown = press(page, "Compare")
    a, b = fusion.classify.asked[-2:]
    assert (a[-1], b[-1]) == (False, True) and chart_of(a) == chart_of(b) == example("1").chart
    assert "▲ +0.20" in shown


def test_compare_says_what_it_lacks(service):
    page = view("compare", *service[:2])
    page.selectbox(key="example").set_value("2").run()
    press(page, "Compare")
    assert "an image and a chart" in page.info[0].value and not service[2].classify.asked


def test_search_shows_pictures_labels_and_impressions_and_takes_filters(service):
    page = view("search", *service[:2])
    press(page, "Search")
    assert "some words" in page.info[0].value
    page.text_input(key="search_text").set_value("effusion")
    shown = press(page, "Search")
    assert shown.count("<figure>") == 6 and "Pneumothorax: denied" in shown and "no picture" in shown and "no labels" in shown
    page.multiselect(key="search_split").set_value(["validate"])
    press(page, "Search")
    assert "No study fits" in page.markdown[-1].value


def test_models_are_told_with_their_intervals_and_cards(service):
    page = view("models", *service[:2])
    shown = html(page)
    assert "0.883 (0.831 to 0.929)" in shown and "not defined" in shown and "give the answer away" in shown
    assert [one.value for one in page.header] == ["fusion", "search"]
    (card,) = [one.value for one in page.markdown if "A card." in one.value]
    assert card.startswith("### Fusion") and "#### Data" in card and "![" not in card


def test_metrics_as_training_leaves_them_are_told_too(keys):
    metrics = {"split": "validate", "macro_auroc": 0.8936}
    about = Loaded(name="fusion", task="fusion", route="/v1/classify", fingerprint="f", data={}, metrics=metrics)
    with ui_server.service(keys[0], fusion=Fake(about=lambda: about)) as address:
        assert ">0.894<" in html(view("models", address, keys[1]))


def test_a_service_with_nothing_loaded_is_no_error(keys):
    with ui_server.service(keys[0], fusion=None, search=None, examples=None) as address:
        assert "no model in it" in view("models", address, keys[1]).info[0].value
        assert list(view("study", address, keys[1]).radio(key="source").options) == ["Your own images"]
