"""The plain English words that tasks, training data and the compact vocabulary share."""

from __future__ import annotations

NOUNS: tuple[str, ...] = tuple(
    """
acorn actor airport album alley almond amber anchor angel ankle anthem apple apron arch arena armor arrow artist ash
atlas atom attic aunt author autumn avenue axe badge bag baker ballet balloon bamboo banana band bank banner barge
bark barn barrel basil basin basket bat bath battery bay beach bead beak beam bean bear beard beaver bed bee beetle
bell belt bench berry bicycle bird biscuit blade blanket blossom board boat bolt bone book boot border bottle boulder
bowl box bracelet branch brass bread breeze brick bridge broom brother brush bubble bucket buckle bud buffalo bulb
bullet bunny burrow bus bush butcher butter button cabbage cabin cable cactus cage cake calendar camel camera camp
canal candle candy cane cannon canoe canvas cape captain car caravan card cargo carpet carrot cart carton castle cat
cave cedar ceiling celery cellar cello cement chain chair chalk channel chapel chapter charcoal chariot chart cheese
cherry chess chest chicken chimney chisel cider cinema circle circus clay cliff clinic cloak clock cloud clover clown
club coach coal coast coat cobra coffee coin collar comb comet compass concert cone copper coral cord cork corn corner
cottage cotton couch cougar counter county cousin cow crab cradle crane crate crater crayon cream creek crest cricket
crow crown crystal cub cube cup cupboard curb curtain curve cushion cycle cymbal daisy dance dawn deck deer delta
desert desk dew diamond diary dinner dish ditch dock doctor dog doll dolphin dome donkey door dove dragon drain drawer
dream dress drill drum duck duke dune dust eagle ear earth easel echo eel egg elbow elephant elk elm ember emerald
engine envelope errand evening fabric factory falcon farm farmer father faucet feast feather fence fern ferry fiddle
field fig film finch finger fir fire fish flag flame flask flax flint flood floor flour flower flute foam fog forest
fork fort fossil fountain fox frame frog frost fruit fudge funnel fur furnace galaxy gallery garage garden garlic
garment gate gazelle gem geyser ghost giant gift ginger giraffe glacier glass globe glove glue goat gold goose gorge
gown grain granite grape grass gravel grove guard guest guitar gull guitarist gym habit hail hall hammer hammock
hamster handle harbor hare harp harvest hat hatch hawk hay hazel hearth hedge heel helmet hen herb hermit heron hill
hinge hive hobby hockey honey hood hook horn hornet horse hotel hound house hub husk hut ice icon igloo inch ink inlet
insect iris iron island ivory ivy jacket jaguar jam jar jasmine jaw jeep jelly jewel jigsaw journal judge jug juice
jungle juniper kayak keeper kennel kettle kid kidney king kiosk kitchen kite kitten knee knife knight knob knot label
lace ladder ladle lagoon lake lamb lamp lance lane lantern lark laser latch lava lawn leaf leather ledge lemon lens
leopard letter lettuce level lever library lid light lighthouse lily lime linen lion lizard llama lobby lobster locker
log loom lotus lumber lunch lute lynx machine magnet maid mall mallet mango manor mantle map maple marble march margin
market marsh mask mason mast mat match maze meadow medal melody melon mermaid mesa metal meteor meter mill mine
mineral minnow mint mirror mist mitten moat model mole monk monkey moon moose morning mosaic moss moth motor mountain
mouse muffin mug mule mural muscle museum mushroom music mustard nail napkin nature neck needle nephew nest net nettle
nickel niece night noodle nose notebook novel nurse nut oak oar oasis oat ocean octopus office olive onion opal opera
orange orbit orchard orchid organ osprey ostrich otter oven owl ox oyster paddle page pail palace palm pan panda panel
panther paper parade parcel park parrot pasta pasture path patio paw pea peach peacock peak peanut pear pearl pebble
pecan pedal pelican pen pencil penguin pepper perch petal phone piano pickle picnic pie pier pig pigeon pillar pillow
pilot pin pine pipe pirate pistol pit pitcher pizza planet plank plant plate plaza plow plum pocket poem poet pole
pond pony poplar poppy porch port porter post pot potato pouch powder prairie prince prism prize pump pumpkin pupil
puppet puppy purse puzzle pyramid quail quarry quartz queen quill quilt quiver rabbit raccoon radar radio radish raft
rail rain raisin rake ram ranch raven razor reed reef reptile ribbon rice rider ridge rifle ring river road robe robin
robot rock rocket rod roof room root rope rose rowboat ruby rudder rug ruler saddle sage sail sailor salad salmon salt
sand sandal sash satin sauce saucer sausage saw scale scarf school scissors scooter scout screen screw scroll sea seal
seed shark shed sheep shelf shell shepherd shield ship shirt shoe shore shovel shrimp shrub sickle signal silk silver
singer sink siren sister skate sketch ski skirt skull sky slate sled sleeve slipper slope snail snake snow soap sock
sofa soil soldier song soup spade spark sparrow spear spice spider spindle spinach spiral sponge spoon spring spruce
square squid squirrel stable stadium stage stair stamp star station statue steam steel stem stick stone stool store
stork storm stove straw stream street string student studio sugar suit summer sun sunset surf swamp swan sweater swing
sword syrup table tablet tailor tank tape tapestry target tavern tea teacher teapot temple tent terrace theater
thicket thimble thistle thorn thread throne thumb thunder ticket tide tiger tile timber tin toad toast tomato tongue
tool tooth torch tower town toy track tractor trail train tray treasure tree trench triangle trolley trophy trout
truck trumpet trunk tub tulip tuna tundra tunnel turban turkey turnip turtle tusk twig umbrella uncle uniform urn
valley valve vase vault veil velvet vessel vest vial village vine vineyard violet violin viper volcano vulture wagon
waiter wall wallet walnut walrus waltz wand wardrobe wasp watch water wave wax weasel wedge whale wharf wheat wheel
whip whisker whistle widow willow wind window wing winter wizard wolf wood wool workshop worm wreath wren wrist yacht
yard yarn yogurt zebra zipper zone
""".split()
)

ADJECTIVES: tuple[str, ...] = tuple(
    """
old young quiet loud bright dark small large narrow wide warm cold gentle rough happy calm brave clever lucky simple
plain proud humble hollow heavy early late fresh dry wet sharp smooth round flat tall short deep clean dusty golden
wooden rusty faint bold lonely busy lazy rapid slow steady tiny grand modest ancient modern distant hidden famous
honest patient curious
""".split()
)

VERBS: tuple[str, ...] = tuple(
    """
rests stands waits sleeps hides turns moves grows falls shines sings stays leans drifts rolls sits
""".split()
)

PREPOSITIONS: tuple[str, ...] = tuple("near behind beside under above beyond below past".split())

COLORS: tuple[str, ...] = tuple("red blue green yellow purple brown black white pink gray".split())

FUNCTION_WORDS: tuple[str, ...] = tuple(
    """
the a an of in on at to for from by with and or is are was what which who where when how all one two three four five
it this that magic number numbers code codes key value values item items holds hold held into copy list words word
most common often appear appears text document note question answer color owner city made belongs lives home has does
do not please painted bought put stands place owns thing things someone coded frequent six seven eight nine ten we go
there back again here color colors name names first last next each any more most other same these those
""".split()
)

# Words that may start a text or a line, so they also exist without a leading space.
LINE_STARTERS: tuple[str, ...] = tuple(
    """
The A An In On At To For From By With And Or Is Are Was What Which Who Where When How All One It This That Copy List
Words Word Coded Who Someone Here There Note Question Answer Q User Assistant Please Hello Yes No
""".split()
)

VALUES: tuple[str, ...] = tuple(f"{value:03d}" for value in range(1000))
